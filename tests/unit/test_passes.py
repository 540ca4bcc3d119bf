"""The builders against their docstrings, row by row; and planted violations that `Part.check` must see."""

from dataclasses import replace

import numpy as np
import pytest
from tests.tiny import FAMILY_CONFIGS, tiny_dual

from orthrus.model.passes import MASK_EMBEDDING, Part, Pass, block, causal, join, tree
from orthrus.model.pool import AR, DIFFUSION, NOBODY, PAGE, SlotPool, Slots

MASK = 99
#          0 -> 1 -> 3 -> 5    and    0 -> 2 -> 4
PARENTS = [0, 0, 1, 2, 3]
PATHS = {0: [], 1: [1], 2: [2], 3: [1, 3], 4: [2, 4], 5: [1, 3, 5]}
IDS = [10, 11, 12, 13, 14, 15]


def pool(num_pages: int = 8) -> SlotPool:
    return SlotPool(FAMILY_CONFIGS["llama"], num_pages)


def slots_of(shared: SlotPool, length: int, num_slots: int) -> Slots:
    slots = Slots(shared)
    assert slots.reserve(num_slots)
    slots.commit(length)
    return slots


def read(part: Part) -> list[set[int]]:
    """Of each row, the rows of its part that it reads."""
    if part.tail_II is None:
        return [set(range(row + 1)) for row in range(part.num_rows)]
    return [set(np.flatnonzero(row_I).tolist()) for row_I in part.tail_II]


@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_chunk_a_step_and_a_chain_are_causal(num_rows: int) -> None:
    ids = list(range(20, 20 + num_rows))
    for part, judged in (
        (causal(ids), range(num_rows)),
        (causal(ids, judged=range(0)), range(0)),
        (causal(ids, judged=range(num_rows - 1, num_rows)), range(num_rows - 1, num_rows)),
    ):
        part.check()
        assert part.token_ids == ids
        assert part.offsets == list(range(num_rows))
        assert (part.num_ar, part.num_rows, part.block_size, part.tail_II) == (num_rows, num_rows, 0, None)
        assert part.judged == judged


def test_a_tree_row_reads_its_ancestors_and_itself() -> None:
    part = tree(IDS, PARENTS)
    part.check()
    assert part.token_ids == IDS
    assert part.offsets == [len(PATHS[row]) for row in range(6)]
    assert read(part) == [{0, row, *PATHS[row]} for row in range(6)]
    assert (part.num_ar, part.block_size, part.judged) == (6, 0, range(6))


@pytest.mark.parametrize("num_nodes", [0, 1, 5])
def test_a_tree_without_branches_is_a_chain(num_nodes: int) -> None:
    part, chain = tree(IDS[: num_nodes + 1], list(range(num_nodes))), causal(IDS[: num_nodes + 1])
    assert part.tail_II is None
    assert [getattr(part, f) for f in Part.__dataclass_fields__] == [
        getattr(chain, f) for f in Part.__dataclass_fields__
    ]


@pytest.mark.parametrize("block_size", [2, 3, 8])
def test_a_draft_pass_with_its_floor_is_the_anchor_and_a_block(block_size: int) -> None:
    part = tree(IDS[:1], [], [0], block_size, MASK)
    part.check()
    assert part.token_ids == [10, 10] + [MASK] * (block_size - 1)
    assert part.offsets == [0, *range(block_size)]
    # The block reads the history before the anchor and itself, not the anchor's AR row.
    assert read(part) == [{0}] + [set(range(1, 1 + block_size))] * block_size
    assert (part.num_ar, part.block_size, part.judged) == (1, block_size, range(1))


@pytest.mark.parametrize("block_size", [2, 3, 8])
def test_the_papers_draft_pass_is_a_block_alone(block_size: int) -> None:
    part = block(10, block_size, MASK)
    part.check()
    assert part.token_ids == [10] + [MASK] * (block_size - 1)
    assert part.offsets == list(range(block_size))
    assert read(part) == [set(range(block_size))] * block_size
    assert (part.num_ar, part.block_size, len(part.judged)) == (0, block_size, 0)


def test_masks_without_an_id_of_their_own_are_marked() -> None:
    assert block(10, 3).token_ids == [10, MASK_EMBEDDING, MASK_EMBEDDING]


def test_a_block_reads_the_path_before_its_anchor_and_itself() -> None:
    """At rows 0, 4 and twice at row 5."""
    block_rows = [0, 4, 5, 5]
    part = tree(IDS, PARENTS, block_rows, 3, MASK)
    part.check()
    assert part.token_ids[6:] == [i for row in block_rows for i in (IDS[row], MASK, MASK)]
    depths = [len(PATHS[row]) for row in block_rows]
    assert part.offsets[6:] == [d + j for d in depths for j in range(3)]
    assert read(part)[:6] == read(tree(IDS, PARENTS))
    for number, row in enumerate(block_rows):
        first = 6 + 3 * number
        before = {r for r in (0, *PATHS[row]) if r != row}
        assert read(part)[first : first + 3] == [before | {first, first + 1, first + 2}] * 3
    assert (part.num_ar, part.block_size, part.judged) == (6, 3, range(6))


@pytest.mark.parametrize("parents", [[0, 2, 1], [0, -1, 1], [0, 1]])
def test_a_tree_that_cannot_be_is_refused(parents: list[int]) -> None:
    with pytest.raises((AssertionError, IndexError)):
        tree(IDS[:4], parents, [0, 2], 3, MASK)


@pytest.mark.parametrize(
    ("row", "see", "instead_of", "message"),
    [
        pytest.param(6, 9, None, "another block", id="another block"),
        pytest.param(9, 6, 0, "another block", id="another block, not the path"),
        pytest.param(7, 8, -1, "not the whole of itself", id="half of itself"),
        pytest.param(6, 0, None, "each position up to its own once", id="the anchor's AR row too"),
        pytest.param(3, 2, None, "each position up to its own once", id="a sibling too"),
        pytest.param(4, 4, 0, "each position up to its own once", id="not the root"),
        pytest.param(3, 9, None, "an AR row reads a diffusion row", id="AR row, block"),
        pytest.param(3, 9, 0, "an AR row reads a diffusion row", id="AR row, block instead of the root"),
        pytest.param(3, 3, -1, "must read itself", id="not itself"),
    ],
)
def test_check_sees_a_row_that_reads_what_it_must_not(
    row: int, see: int, instead_of: int | None, message: str
) -> None:
    """Rows 6, 7, 8 are the block at row 0; rows 9, 10, 11 the one at row 4. instead_of -1 hides `see`."""
    part = tree(IDS, PARENTS, [0, 4], 3, MASK)
    assert part.tail_II is not None
    tail_II = part.tail_II.copy()
    tail_II[row, see] = instead_of != -1
    if instead_of not in (None, -1):
        tail_II[row, instead_of] = False
    broken = replace(part, tail_II=tail_II)
    with pytest.raises(AssertionError, match=message):
        broken.check()
    with pytest.raises(AssertionError, match=message):
        join([(broken, slots_of(pool(), 7, 40))])


def test_check_sees_an_impossible_split_and_a_chain_that_is_none() -> None:
    with pytest.raises(AssertionError):
        replace(causal(IDS), num_ar=7).check()
    with pytest.raises(AssertionError, match="only a chain needs no tail"):
        replace(causal(IDS), num_ar=5).check()
    with pytest.raises(AssertionError, match="only a chain needs no tail"):
        replace(causal(IDS), offsets=[0, 1, 2, 3, 4, 4]).check()


def three(shared: SlotPool) -> tuple[Pass, list[Slots]]:
    """A chunk after 60 tokens, a tree with two blocks after 7, a block alone after 130."""
    parts = [causal(IDS), tree(IDS, PARENTS, [0, 4], 3, MASK), block(16, 4, MASK)]
    slots = [slots_of(shared, length, length + 20) for length in (60, 7, 130)]
    return join(list(zip(parts, slots, strict=True))), slots


def test_joined_parts_lie_ar_rows_first_and_know_their_own_slots() -> None:
    shared = pool()
    p, slots = three(shared)
    assert (p.num_rows, p.num_ar_rows) == (6 + 12 + 4, 12)
    assert [span.ar_rows for span in p.spans] == [slice(0, 6), slice(6, 12), slice(12, 12)]
    assert [span.draft_rows for span in p.spans] == [slice(12, 12), slice(12, 18), slice(18, 22)]
    assert [span.length for span in p.spans] == [60, 7, 130]
    for span, own in zip(p.spans, slots, strict=True):
        rows = [*range(p.num_rows)[span.ar_rows], *range(p.num_rows)[span.draft_rows]]
        assert p.token_ids_R[rows].tolist() == span.part.token_ids
        assert p.position_ids_R[rows].tolist() == [span.length + offset for offset in span.part.offsets]
        places = own.places(np.arange(span.length + span.part.num_rows)).tolist()
        assert p.slots_R[rows].tolist() == places[span.length :]
        assert span.places.tolist() == places
    assert len(set(p.slots_R.tolist())) == p.num_rows


def test_the_ledger_knows_who_writes_what() -> None:
    shared = pool()
    p, _ = three(shared)
    written = p.slots_R.numpy()
    assert (shared.positions_S[written] == p.position_ids_R.numpy()).all()
    assert set(shared.writers_S[written[:12]]) == {AR}
    assert set(shared.writers_S[written[12:]]) == {DIFFUSION}
    others = np.setdiff1d(np.arange(shared.num_slots), written)
    assert set(shared.writers_S[others]) == {NOBODY}


def test_the_plan_says_all_that_attention_needs() -> None:
    """As `kernels/attention.cpp` reads it."""
    p, slots = three(pool())
    plan = p.plan_P.tolist()
    num_spans, positions_at = plan[:2]
    assert num_spans == 3
    assert plan[positions_at:] == p.position_ids_R.tolist()
    for number, (span, own) in enumerate(zip(p.spans, slots, strict=True)):
        ar_first, num_ar, draft_first, num_draft, length, pages_at, tail_at, words = plan[
            2 + 8 * number : 10 + 8 * number
        ]
        part = span.part
        assert (ar_first, num_ar, draft_first, num_draft, length) == (
            *(span.ar_first, part.num_ar, span.draft_first, part.num_rows - part.num_ar),
            span.length,
        )
        num_pages = -(-(length + part.num_rows) // PAGE)
        assert plan[pages_at : pages_at + num_pages] == own.pages[:num_pages]
        if part.tail_II is None:
            assert (tail_at, words) == (0, 0)
            continue
        lines = np.array(plan[tail_at : tail_at + part.num_rows * words], dtype=np.int64)
        bits = np.unpackbits(lines.view(np.uint8).reshape(part.num_rows, -1), axis=1, bitorder="little")
        assert (bits[:, : part.num_rows] == part.tail_II).all()
        assert not bits[:, part.num_rows :].any()


def test_join_refuses_rows_without_slots_and_rows_over_shared_history() -> None:
    shared = pool()
    with pytest.raises(AssertionError, match="slots for the rows of a pass come first"):
        join([(causal(IDS), slots_of(shared, 60, PAGE))])
    slots = slots_of(shared, 60, 2 * PAGE)
    shared.share(slots.pages[1])
    with pytest.raises(AssertionError, match="overwrite shared history"):
        join([(causal(IDS), slots)])
    with pytest.raises(AssertionError, match="a pass has rows"):
        join([])
    # A shared page of whole history is no matter.
    shared.release(slots.pages[1])
    slots.commit(4)
    shared.share(slots.pages[0])
    join([(causal(IDS), slots)])


def test_mask_ids_of_a_view_without_mask_token_reach_the_pass() -> None:
    dual = tiny_dual(mask_token_id=None)
    p = join([(block(5, 3, dual.mask_token_id), slots_of(pool(), 0, 8))])
    assert p.token_ids_R.tolist() == [5, MASK_EMBEDDING, MASK_EMBEDDING]
