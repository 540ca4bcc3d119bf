"""`verify_tree` and `fused` against their docstrings, row by row; and planted violations."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from orthrus.model.passes import Pass, draft_block, fused, verify_chain, verify_tree

MASK = 99
#          0 -> 1 -> 3 -> 5    and    0 -> 2 -> 4
PARENTS = [0, 0, 1, 2, 3]
PATHS = {0: [], 1: [1], 2: [2], 3: [1, 3], 4: [2, 4], 5: [1, 3, 5]}


def ids(num_rows: int) -> Tensor:
    return torch.arange(10, 10 + num_rows)[None]


def read_slots(p: Pass) -> list[set[int]]:
    return [set(row_S.nonzero()[:, 0].tolist()) for row_S in p.visible_BTS[0]]


def same(a: Pass, b: Pass) -> bool:
    tensors = ("token_ids_BT", "position_ids_BT", "slots_BT", "visible_BTS", "logit_rows_R")
    return all(torch.equal(getattr(a, t), getattr(b, t)) for t in tensors) and (
        (a.num_ar_rows, a.block_size) == (b.num_ar_rows, b.block_size)
    )


@pytest.mark.parametrize("length", [0, 7])
def test_a_tree_row_reads_the_history_its_ancestors_and_itself(length: int) -> None:
    p = verify_tree(ids(6), PARENTS, [length])
    p.check([length])
    assert p.token_ids_BT.tolist() == [[10, 11, 12, 13, 14, 15]]
    assert p.position_ids_BT.tolist() == [[length + len(PATHS[row]) for row in range(6)]]
    assert p.slots_BT.tolist() == [[length + row for row in range(6)]]
    assert read_slots(p) == [
        {*range(length), *(length + r for r in {0, row, *PATHS[row]})} for row in range(6)
    ]
    assert (p.num_ar_rows, p.logit_rows_R.tolist(), p.num_slots) == (6, list(range(6)), length + 6)


@pytest.mark.parametrize("num_nodes", [0, 1, 5])
@pytest.mark.parametrize("length", [0, 7])
def test_a_tree_without_branches_is_a_chain(length: int, num_nodes: int) -> None:
    token_ids_1T = ids(num_nodes + 1)
    chain = verify_chain(token_ids_1T, [length])
    assert same(verify_tree(token_ids_1T, list(range(num_nodes)), [length]), chain)
    assert same(fused(token_ids_1T, list(range(num_nodes)), [length], [], 8, MASK), chain)


def test_a_block_at_the_anchor_alone_is_the_draft_pass_with_its_floor() -> None:
    floor = draft_block(ids(1), [7], 5, MASK, floor=True)
    p = fused(ids(1), [], [7], [0], 5, MASK)
    assert p.logit_rows_R.tolist() == [0]
    assert same(replace(p, logit_rows_R=floor.logit_rows_R), floor)


@pytest.mark.parametrize("length", [0, 7])
def test_a_block_reads_the_path_before_its_anchor_and_itself(length: int) -> None:
    """At rows 0, 4 and twice at row 5, with other tokens given."""
    block_rows, given = [0, 4, 5, 5], [[], [70], [71, 72], []]
    p = fused(ids(6), PARENTS, [length], block_rows, 3, MASK, given)
    p.check([length])
    nothing_given = fused(ids(6), PARENTS, [length], [0, 4], 3, MASK, [[], []])
    assert same(fused(ids(6), PARENTS, [length], [0, 4], 3, MASK), nothing_given)
    blocks = [[10, MASK, MASK], [14, 70, MASK], [15, 71, 72], [15, MASK, MASK]]
    assert p.token_ids_BT[0, 6:].view(4, 3).tolist() == blocks
    starts = [length + len(PATHS[row]) for row in block_rows]
    assert p.position_ids_BT[0, 6:].view(4, 3).tolist() == [[s, s + 1, s + 2] for s in starts]
    assert p.slots_BT[0].tolist() == [length + row for row in range(6 + 4 * 3)]
    assert read_slots(p)[:6] == read_slots(verify_tree(ids(6), PARENTS, [length]))
    for block, row in enumerate(block_rows):
        first = 6 + 3 * block
        before = [r for r in {0, *PATHS[row]} if r != row]
        expected = {*range(length), *(length + r for r in [*before, first, first + 1, first + 2])}
        assert read_slots(p)[first : first + 3] == [expected] * 3
    assert (p.num_ar_rows, p.block_size, p.logit_rows_R.tolist()) == (6, 3, list(range(6)))


@pytest.mark.parametrize(
    ("parents", "given"),
    [([0, 2, 1], []), ([0, -1, 1], []), ([0, 1], []), ([0, 1, 2], [[1]]), ([0, 1, 2], [[1, 2, 3], []])],
)
def test_a_tree_or_block_that_cannot_be_is_refused(parents: list[int], given: list[list[int]]) -> None:
    with pytest.raises(AssertionError):
        fused(ids(4), parents, [7], [0, 2], 3, MASK, given)


@pytest.mark.parametrize(
    ("row", "see", "instead_of", "message"),
    [
        pytest.param(6, 9, None, "another block", id="another block"),
        pytest.param(9, 6, 0, "another block", id="another block, not the path"),
        pytest.param(7, 8, -1, "not the whole of itself", id="half of itself"),
        pytest.param(6, 0, None, "each position up to its own once", id="the anchor's AR row too"),
        pytest.param(3, 2, None, "each position up to its own once", id="a sibling too"),
        pytest.param(4, 4, 0, "each position up to its own once", id="not the root"),
        pytest.param(3, 9, None, "an AR row sees a diffusion row", id="AR row, block"),
        pytest.param(3, 2, -7, "each position up to its own once", id="a sibling, not the history"),
        pytest.param(6, 0, -4, "each position up to its own once", id="the anchor's AR row, not the history"),
    ],
)
def test_check_sees_a_row_that_reads_what_it_must_not(
    row: int, see: int, instead_of: int | None, message: str
) -> None:
    """Rows 6, 7, 8 are the block at row 0; rows 9, 10, 11 the one at row 4. Slots count from the anchor's: -7
    is the first of the history; instead_of -1 hides `see`."""
    p = fused(ids(6), PARENTS, [7], [0, 4], 3, MASK)
    visible_BTS = p.visible_BTS.clone()
    visible_BTS[0, row, 7 + see] = instead_of != -1
    if instead_of not in (None, -1):
        visible_BTS[0, row, 7 + instead_of] = False
    with pytest.raises(AssertionError, match=message):
        replace(p, visible_BTS=visible_BTS).check([7])
