"""Our attention over paged slots against PyTorch's, and rows that know no other rows."""

from dataclasses import dataclass, replace

import pytest
import torch
from tests.tiny import FAMILY_CONFIGS
from torch import Tensor

from orthrus.kernels.build import load_kernels
from orthrus.model.passes import Pass, block, causal, join, tree
from orthrus.model.pool import PAGE, SlotPool, Slots, transposed

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 over bfloat16": (torch.float32, torch.bfloat16),
}
"""Of queries and outputs, and of the pool."""
Dtypes = tuple[torch.dtype, torch.dtype]
# heads, heads of keys, size: shared keys and not, sizes that fill no vector.
SHAPES = [(9, 3, 64), (4, 4, 80), (4, 2, 8), (2, 1, 20)]
# A chunk of a prompt, a tree with blocks, a step, the paper's draft pass; histories of several pages and none.
PARTS = [
    (causal(list(range(130))), 200),
    (tree(list(range(25)), [max(0, i - 2) for i in range(24)], [0, 7], 6, 0), 90),
    (causal([1]), 6),
    (block(1, 8, 0), 64),
    (causal([1, 2, 3]), 0),
]


@dataclass
class Case:
    p: Pass
    slots: list[Slots]
    query: Tensor
    keys: Tensor
    values: Tensor
    window: int = 0
    cap: float = 0.0

    def attend(self) -> Tensor:
        scale = self.query.shape[-1] ** -0.5
        return torch.ops.orthrus.paged_attention(  # type: ignore[no-any-return]
            self.query, transposed(self.keys), self.values, self.p.plan_P, scale, self.window, self.cap
        )

    def rows(self, number: int) -> list[int]:
        """Of the pass, those of one request."""
        span, rows = self.p.spans[number], range(self.p.num_rows)
        return [*rows[span.ar_rows], *rows[span.draft_rows]]


def attention_of(shape: tuple[int, int, int], dtypes: Dtypes, window: int = 0, cap: float = 0.0) -> Case:
    """Of all parts in one pass, over pages that lie mixed up."""
    (heads, kv, size), (dtype, kv_dtype) = shape, dtypes
    pages = SlotPool(FAMILY_CONFIGS["llama"], 16)
    slots = [Slots(pages) for _ in PARTS]
    for num_pages in (1, 2, 6):
        for own, (part, length) in zip(slots, PARTS, strict=True):
            assert own.reserve(min(num_pages * PAGE, length + part.num_rows))
    for own, (_, length) in zip(slots, PARTS, strict=True):
        own.commit(length)
    p = join([(part, own) for (part, _), own in zip(PARTS, slots, strict=True)])
    torch.manual_seed(1)
    query = torch.randn(1, p.num_rows, heads, size, dtype=dtype).transpose(1, 2)
    keys, values = torch.randn(2, 1, kv, pages.num_slots, size, dtype=kv_dtype)
    return Case(p, slots, query, keys, values, window, cap)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    load_kernels()


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention(shape: tuple[int, int, int], dtypes: Dtypes, window: int, cap: float) -> None:
    case = attention_of(shape, dtypes, window, cap)
    ours = case.attend()
    assert ours.dtype == dtypes[0]
    assert ours.shape == (1, case.p.num_rows, *shape[::2])
    for number, span in enumerate(case.p.spans):
        part, places = span.part, torch.from_numpy(span.places)
        positions = torch.tensor([*range(span.length), *(span.length + o for o in part.offsets)])
        tail = torch.ones(part.num_rows, part.num_rows).tril().bool()
        tail = tail if part.tail_II is None else torch.from_numpy(part.tail_II)
        visible = torch.cat([torch.ones(part.num_rows, span.length, dtype=torch.bool), tail], 1)
        if window:
            visible &= positions[span.length :, None] - positions < window
        rows, fold = case.rows(number), shape[0] // shape[1]
        query, keys, values = (
            tensor.double()
            for tensor in (case.query[:, :, rows], case.keys[:, :, places], case.values[:, :, places])
        )
        keys, values = keys.repeat_interleave(fold, 1), values.repeat_interleave(fold, 1)
        scores = query @ keys.mT * shape[2] ** -0.5
        scores = cap * torch.tanh(scores / cap) if cap else scores
        expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values
        tolerance = 2e-6 if ours.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(
            ours[:, rows].double(), expected.transpose(1, 2), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_request_is_alike_in_any_company_and_wherever_its_slots_lie(
    shape: tuple[int, int, int], dtypes: Dtypes, window: int
) -> None:
    case = attention_of(shape, dtypes, window)
    together = case.attend()
    pages = SlotPool(FAMILY_CONFIGS["llama"], 16)
    for number, (part, length) in enumerate(PARTS):
        # Pages from the last to the first, with rubbish between them.
        slots = Slots(pages)
        slots.reserve(length + part.num_rows)
        slots.pages.reverse()
        slots.commit(length)
        p = join([(part, slots)])
        stores = []
        for store in (case.keys, case.values):
            other = torch.full((1, shape[1], pages.num_slots, shape[2]), torch.nan, dtype=store.dtype)
            here, there = (torch.from_numpy(span.places) for span in (p.spans[0], case.p.spans[number]))
            other[:, :, here] = store[:, :, there]
            stores.append(other)
        rows = case.rows(number)
        alone = Case(p, [slots], case.query[:, :, rows], *stores, window=window).attend()
        assert torch.equal(alone, together[:, rows])
        slots.length = 0
        slots.free()


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_a_chunk_is_alike_one_by_one(shape: tuple[int, int, int], dtypes: Dtypes) -> None:
    case = attention_of(shape, dtypes)
    together, rows, slots = case.attend(), case.rows(0), case.slots[0]
    for row in (0, 1, 63, 64, 129):
        slots.length = 200 + row
        p = join([(causal([5]), slots)])
        query = case.query[:, :, rows[row] : rows[row] + 1]
        alone = Case(p, [slots], query, case.keys, case.values).attend()
        assert torch.equal(alone[:, 0], together[:, rows[row]])


def test_plans_that_do_not_fit_are_refused() -> None:
    case = attention_of(SHAPES[0], DTYPES["float32"])
    plan = case.p.plan_P
    for change, message in (
        (plan[:1], "without a head"),
        (plan[:-1], "ends too early"),
        (plan.int(), "whole numbers"),
        (_changed(plan, 0, 10**6), "ends too early"),
        (_changed(plan, 0, 0), "ends too early"),
        (_changed(plan, 2, -1), "does not fit its plan"),
        (_changed(plan, 3, 10**6), "does not fit its plan"),
        (_changed(plan, 6, -1), "does not fit its plan"),
        (_changed(plan, int(plan[7]), 16), "no such page"),
        (_changed(plan, int(plan[7]), -1), "no such page"),
    ):
        case.p = replace(case.p, plan_P=change)
        with pytest.raises(RuntimeError, match=message):
            case.attend()
    case.p = replace(case.p, plan_P=plan)
    case.query = case.query.bfloat16()
    with pytest.raises(RuntimeError, match="a pool of the queries' dtype"):
        case.attend()


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_attention_to_what_is_no_number_is_none(dtypes: Dtypes) -> None:
    case = attention_of(SHAPES[0], dtypes)
    case.query[0, 2, 4, 7] = torch.nan
    out = case.attend()
    assert out[0, 4, 2].isnan().all()
    assert out[0, 4, 1].isfinite().all()


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_what_a_row_may_not_read_cannot_reach_it(dtypes: Dtypes, window: int, rubbish: float) -> None:
    """All slots that nobody may read, and what the diffusion rows wrote: the AR rows stay equal to the bit."""
    case = attention_of(SHAPES[0], dtypes, window)
    before = case.attend()
    free = torch.ones(case.keys.shape[2], dtype=torch.bool)
    for span in case.p.spans:
        free[torch.from_numpy(span.places)] = False
    free[case.p.slots_R[case.p.num_ar_rows :]] = True
    for store in (case.keys, case.values):
        store[:, :, free] = rubbish
    after = case.attend()
    num_ar = case.p.num_ar_rows
    assert torch.equal(after[:, :num_ar], before[:, :num_ar])
    assert not torch.equal(after[:, num_ar:], before[:, num_ar:])


def _changed(plan: Tensor, place: int, value: int) -> Tensor:
    plan = plan.clone()
    plan[place] = value
    return plan
