"""Our kernels against PyTorch's linears and attention, and rows that know no other rows."""

import os
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import FAMILY_CONFIGS, VOCAB, tiny_dual
from torch import Tensor, nn

from orthrus.kernels import best, build, pairs
from orthrus.kernels.build import load_kernels
from orthrus.kernels.linear import FewRowsLinear, FewRowsTwin, fast_linear, fast_twin, has_tiles
from orthrus.model import pool
from orthrus.model.drafting import RepairTables
from orthrus.model.int4_linear import Int4Linear
from orthrus.model.int8_linear import Int8Linear
from orthrus.model.passes import Pass, block, causal, join, tree
from orthrus.model.pool import PAGE, SlotPool, Slots
from orthrus.model.twin import RowSplit, Twin

QUANTISED: dict[str, Any] = {"int8": Int8Linear, "int4": Int4Linear}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = [*DTYPES, *QUANTISED]
# Whole blocks of outputs and not, an odd number of inputs, more inputs than int8 sums hold in float32.
SIZES = [(48, 96), (33, 17), (70, 48), (5, 3008)]
LAYOUTS = pytest.mark.parametrize(
    ("kind", "tiles"),
    [*((kind, False) for kind in KINDS), ("bfloat16", True), ("int8", True)],
    ids=lambda value: ["plain", "tiles"][value] if isinstance(value, bool) else value,
)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    load_kernels()


def linear(outputs: int, inputs: int, kind: str, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    if kind in QUANTISED:
        # Four bits take whole groups of inputs.
        inputs = inputs if kind == "int8" else -(-inputs // 32) * 32
        return QUANTISED[kind].of(nn.Linear(inputs, outputs, bias=bias))
    return nn.Linear(inputs, outputs, bias=bias, dtype=DTYPES[kind])


def fast(slow: nn.Module, tiles: bool) -> FewRowsLinear:
    if tiles and not has_tiles():
        pytest.skip("needs AMX")
    return FewRowsLinear.of([slow], tiles=tiles)


def rows(num: int, size: int, kind: str) -> Tensor:
    x = torch.randn(num, size) * torch.logspace(-1, 1, num)[:, None]
    return x.bfloat16() if kind == "bfloat16" else x


@LAYOUTS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@torch.inference_mode()
def test_it_is_the_linear(outputs: int, inputs: int, bias: bool, tiles: bool, kind: str) -> None:
    slow = linear(outputs, inputs, kind, bias)
    ours = fast(slow, tiles)
    inputs = ours.in_features
    for num in (0, 1, 2, 7, 33, 150):
        x = rows(num, inputs, kind)
        assert ours(x).shape == (num, outputs)
        if kind == "int8":
            assert torch.equal(ours(x), slow(x))
        else:
            torch.testing.assert_close(
                ours(x), slow(x), atol=2e-5, rtol=1e-2 if x.dtype.itemsize == 2 else 1e-5
            )
    assert ours(rows(6, inputs, kind).view(2, 3, inputs)).shape == (2, 3, outputs)


@LAYOUTS
@torch.inference_mode()
def test_rows_do_not_know_each_other(tiles: bool, kind: str) -> None:
    ours = fast(linear(200, 576, kind), tiles)
    x = rows(60, 576, kind)
    together = ours(x)
    for first, last in ((0, 1), (7, 9), (3, 11), (0, 17), (20, 49), (11, 60)):
        assert torch.equal(ours(x[first:last]), together[first:last])


@torch.inference_mode()
def test_int8_in_a_model_of_bfloat16() -> None:
    slow = Int8Linear.of(nn.Linear(32, 20, dtype=torch.bfloat16))
    x = rows(5, 32, "bfloat16")
    assert torch.equal(fast(slow, tiles=False)(x), slow(x))


@LAYOUTS
@torch.inference_mode()
def test_what_is_no_number_stays_none(kind: str, tiles: bool) -> None:
    ours = fast(linear(20, 33, kind), tiles=tiles)
    x = rows(2, ours.in_features, kind)
    for place in (3, 32):
        x[0, place] = torch.nan
        out = ours(x)
        assert out[0].isnan().all()
        assert out[1].isfinite().all()
        x[0, place] = 1.0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_attention_to_what_is_no_number_is_none(dtype: torch.dtype) -> None:
    case = attention_of(SHAPES[0], dtype)
    case.query[0, 2, 4, 7] = torch.nan
    out = case.attend()
    assert out[0, 4, 2].isnan().all()
    assert out[0, 4, 1].isfinite().all()


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_what_a_row_may_not_read_cannot_reach_it(dtype: torch.dtype, window: int, rubbish: float) -> None:
    """All slots that nobody may read, and what the diffusion rows wrote: the AR rows stay equal to the bit."""
    case = attention_of(SHAPES[0], dtype, window)
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


def test_what_does_not_fit_is_refused() -> None:
    ours = fast(linear(20, 32, "int8"), tiles=False)
    with pytest.raises(RuntimeError, match="inputs that do not fit"):
        ours(torch.ones(2, 40))
    with pytest.raises(RuntimeError, match="inputs that do not fit"):
        fast(linear(20, 64, "int4"), tiles=False)(torch.ones(2, 50))
    packed = ours.weight.transpose(2, 3).contiguous()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="packed for another processor"):
        torch.ops.orthrus.few_rows_linear(torch.ones(2, 32), packed, ours.scales, None, 20)
    with pytest.raises(RuntimeError, match="scales are for weights of int8"):
        torch.ops.orthrus.few_rows_linear(torch.ones(2, 32), ours.weight, None, None, 20)


@pytest.mark.timeout(900)
def test_damaged_kernels_are_made_anew(tmp_path: Path) -> None:
    """And on shorter vectors without dot products, as other processors have them, all of the above holds.

    Where vectors are short anyhow one of the tests will do.
    """
    program = f"""
import sys, pytest, torch._inductor.config
from orthrus.kernels import build
torch._inductor.config.cpp.simdlen = 256
build.FLAGS += ["-mno-avx512f", "-mno-avxvnni"] * torch.cpu._is_avx512_supported()
made = build._build
def made_damaged(folder):
    build._build = made
    (folder / "damaged.so").write_bytes(b"damaged")
    return folder / "damaged.so"
build._build = made_damaged
with pytest.raises(OSError):
    build.load_kernels()
build.load_kernels()
others = "not made_anew and not nothing_behind" if torch.cpu._is_avx512_supported() else "both_of_its_linears"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {__file__!r}, "-k", others]))
"""
    environment = {**os.environ, "ORTHRUS_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@LAYOUTS
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_twin_is_both_of_its_linears(bias: bool, kind: str, tiles: bool) -> None:
    bias = bias and kind not in QUANTISED
    torch.manual_seed(3)
    ar, diffusion = (fast(linear(70, 64, kind, bias), tiles) for _ in range(2))
    diffusion.weight = diffusion.weight.flip(0)
    split = RowSplit()
    twin = fast_twin(ar, diffusion, split)
    assert isinstance(twin, FewRowsTwin)
    for num, num_ar in ((9, 1), (9, 9), (9, 0), (50, 3), (70, 36), (5, 4), (80, 16), (96, 32)):
        x = rows(num, 64, kind)[None]
        with split.at(num_ar):
            together = twin(x)
        assert torch.equal(together, torch.cat([ar(x[:, :num_ar]), diffusion(x[:, num_ar:])], 1))


@pytest.mark.parametrize("kinds", [("int4", "int8"), ("int8", "int4")])
@torch.inference_mode()
def test_a_twin_of_two_layouts(kinds: tuple[str, str]) -> None:
    ar, diffusion = (fast_linear([linear(70, 64, kind, bias=False)]) for kind in kinds)
    split = RowSplit()
    twin = fast_twin(ar, diffusion, split)
    assert isinstance(twin, FewRowsTwin)
    assert ar is not None
    assert diffusion is not None
    for num, num_ar in ((9, 1), (9, 9), (9, 0), (50, 13)):
        x = rows(num, 64, "int8")[None]
        with split.at(num_ar):
            together = twin(x)
        assert torch.equal(together, torch.cat([ar(x[:, :num_ar]), diffusion(x[:, num_ar:])], 1))


def test_unlike_linears_make_a_twin_of_two_products() -> None:
    ar, diffusion = fast(linear(70, 48, "float32"), False), fast(linear(70, 48, "int8"), False)
    twin = fast_twin(ar, diffusion, RowSplit())
    assert type(twin) is Twin
    assert fast_twin(ar, None, RowSplit()) is None


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_joined_linears_are_those_linears_side_by_side(kind: str) -> None:
    parts = [linear(size, 64, kind, bias) for size, bias in ((40, True), (8, False), (16, True))]
    joined = fast_linear(parts)
    assert joined is not None
    x = rows(3, 64, kind)
    expected = torch.cat([part(x) for part in parts], -1)
    torch.testing.assert_close(
        joined(x), expected, rtol=0 if kind == "int8" else None, atol=0 if kind == "int8" else None
    )


def test_what_cannot_be_laid_out_is_left() -> None:
    half = nn.Linear(8, 8, dtype=torch.float16)
    assert fast_linear([half]) is None
    assert fast_linear([linear(8, 8, "float32"), linear(8, 8, "bfloat16")]) is None
    assert fast_linear([linear(8, 8, "float32"), linear(8, 8, "int8")]) is None
    assert fast_linear([linear(8, 32, "int4"), linear(8, 32, "int8")]) is None
    assert fast_linear([nn.Identity()]) is None


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
            self.query, self.keys, self.values, self.p.plan_P, scale, self.window, self.cap
        )

    def rows(self, number: int) -> list[int]:
        """Of the pass, those of one request."""
        span, rows = self.p.spans[number], range(self.p.num_rows)
        return [*rows[span.ar_rows], *rows[span.draft_rows]]


def attention_of(shape: tuple[int, int, int], dtype: torch.dtype, window: int = 0, cap: float = 0.0) -> Case:
    """Of all parts in one pass, over pages that lie mixed up."""
    heads, kv, size = shape
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
    keys, values = torch.randn(2, 1, kv, pages.num_slots, size, dtype=dtype)
    return Case(p, slots, query, keys, values, window, cap)


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention(shape: tuple[int, int, int], dtype: torch.dtype, window: int, cap: float) -> None:
    case = attention_of(shape, dtype, window, cap)
    ours = case.attend()
    assert ours.dtype == dtype
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
        tolerance = 2e-6 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(
            ours[:, rows].double(), expected.transpose(1, 2), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_request_is_alike_in_any_company_and_wherever_its_slots_lie(
    shape: tuple[int, int, int], dtype: torch.dtype, window: int
) -> None:
    case = attention_of(shape, dtype, window)
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
            other = torch.full((1, shape[1], pages.num_slots, shape[2]), torch.nan, dtype=dtype)
            here, there = (torch.from_numpy(span.places) for span in (p.spans[0], case.p.spans[number]))
            other[:, :, here] = store[:, :, there]
            stores.append(other)
        rows = case.rows(number)
        alone = Case(p, [slots], case.query[:, :, rows], *stores, window=window).attend()
        assert torch.equal(alone, together[:, rows])
        slots.length = 0
        slots.free()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_a_chunk_is_alike_one_by_one(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = attention_of(shape, dtype)
    together, rows, slots = case.attend(), case.rows(0), case.slots[0]
    for row in (0, 1, 63, 64, 129):
        slots.length = 200 + row
        p = join([(causal([5]), slots)])
        query = case.query[:, :, rows[row] : rows[row] + 1]
        alone = Case(p, [slots], query, case.keys, case.values).attend()
        assert torch.equal(alone[:, 0], together[:, rows[row]])


def test_plans_that_do_not_fit_are_refused() -> None:
    case = attention_of(SHAPES[0], torch.float32)
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
    with pytest.raises(RuntimeError, match="all alike"):
        case.attend()


def _changed(plan: Tensor, place: int, value: int) -> Tensor:
    plan = plan.clone()
    plan[place] = value
    return plan


def test_sources_that_do_not_compile_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("no such code")
    monkeypatch.setattr(build, "SOURCES", [broken])
    monkeypatch.setattr(build, "_are_loaded", threading.Event())
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(Exception, match="compile"):
        load_kernels()
    assert {path.suffix for path in (tmp_path / "cache" / "compiled").iterdir()} == {".lock"}


@pytest.mark.parametrize("size", [5, 16, 300, 4097])
@pytest.mark.parametrize("num", [1, 3, 16])
def test_best_tokens_are_those_of_topk(size: int, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(size + num)
    num = min(num, size)
    scores_RV = torch.randn(4, size) * 4
    # All candidates in one chunk; what a filter has left over; nothing but what it has thrown away.
    scores_RV[1] = torch.linspace(3, -3, size)
    scores_RV[2, num:] = -torch.inf
    scores_RV[3] = -torch.inf
    values_RN, ids_RN, totals_R1 = best.best_tokens(scores_RV, num)
    assert torch.equal(values_RN, scores_RV.gather(1, ids_RN))
    monkeypatch.setattr(best, "kernels_loaded", lambda: False)
    slow_RN, _, slow_R1 = best.best_tokens(scores_RV, num)
    assert torch.equal(values_RN, slow_RN)
    torch.testing.assert_close(totals_R1, slow_R1)
    assert all(len(set(row)) == num for row in ids_RN.tolist())


def test_best_tokens_of_equal_scores_are_the_first_ones() -> None:
    scores_RV = torch.randint(0, 3, (5, 700), generator=torch.Generator().manual_seed(0)).float()
    _, ids_RN, _ = best.best_tokens(scores_RV, 16)
    assert torch.equal(ids_RN, scores_RV.sort(dim=1, descending=True, stable=True).indices[:, :16])


def test_best_tokens_leave_out_what_is_no_number() -> None:
    scores_RV = torch.full((2, 300), torch.nan)
    scores_RV[0, [7, 200]] = torch.tensor([1.0, 2.0])
    values_RN, ids_RN, _ = best.best_tokens(scores_RV, 3)
    assert ids_RN[0, :2].tolist() == [200, 7]
    assert values_RN.isnan().tolist() == [[False, False, True], [True, True, True]]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rank", [3, 16, 37])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_pairs_are_those_of_the_repair_head(
    dtype: torch.dtype, rank: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dual = tiny_dual("llama", repair_rank=rank).to(dtype)
    assert dual.repair is not None
    torch.manual_seed(rank)
    nn.init.normal_(dual.repair.out.weight, 0.0, 0.5)
    tables = RepairTables.of(dual)
    hidden_DC, scores_DV = torch.randn(5, 32, dtype=dtype), torch.randn(5, VOCAB) * 3
    scores_DV[1] = -torch.inf
    scores_DV[1, :2] = torch.tensor([1.0, 2.0])
    top, totals_D1 = scores_DV.topk(8), scores_DV.logsumexp(-1, keepdim=True)
    parents_DP = torch.randint(0, VOCAB, (5, 4))
    given = dual, tables, hidden_DC, parents_DP, top.indices, top.values, totals_D1, temperature
    with torch.inference_mode():
        ours_DPM = pairs.repaired_pairs(*given)
        monkeypatch.setattr(pairs, "kernels_loaded", lambda: False)
        slow_DPM = pairs.repaired_pairs(*given)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours_DPM, slow_DPM, atol=tolerance, rtol=tolerance)
    assert ours_DPM[1, :, 2:].isneginf().all()
    assert (ours_DPM[2, 0] - ours_DPM[2, 1]).abs().max() > 0.1


@pytest.mark.parametrize("size", [1, 16, 300, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_best_is_that_of_argmax(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    scores_RV = (torch.randn(6, size) * 4).to(dtype)
    scores_RV[1] = scores_RV[1].round()
    scores_RV[2] = -torch.inf
    scores_RV[3] = torch.linspace(-3, 3, size)
    scores_RV[4, : size // 2] = torch.nan
    found_R = best.first_best(scores_RV)
    expected_R = scores_RV.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(
        dim=1, descending=True, stable=True
    )
    assert torch.equal(found_R, expected_R.indices[:, 0])
    assert best.first_best(scores_RV[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slots_move_as_they_are_indexed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # One of them a window on a longer store.
    stores = [torch.randn(1, 3, 20, 5).to(dtype), torch.randn(1, 2, 40, 7).to(dtype)[:, :, 3:30]]
    expected = [store.clone() for store in stores]
    sources, targets = [8, 9, 13, 14, 19], [8, 4, 9, 10, 2]
    pool.move_slots(expected, sources, targets)
    torch.ops.orthrus.move_slots(stores, sources, targets)
    for store, other in zip(stores, expected, strict=True):
        assert torch.equal(store, other)
    for wrong in (([7], [8, 9]), ([20], [1]), ([1], [20]), ([-1], [1])):
        with pytest.raises(RuntimeError, match="move_slots"):
            torch.ops.orthrus.move_slots(stores, *wrong)
