"""The builders against their docstrings, row by row; and planted violations that `Pass.check` must see."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.model.passes import Pass, ar_step, draft_block, prefill, verify_chain

MASK = 99


def causal_oracle(lengths: list[int], num_rows: int) -> tuple[list[list[int]], list[list[set[int]]]]:
    """Row i of a sequence of length n stands at n + i and reads slots 0 .. n + i."""
    positions = [[n + i for i in range(num_rows)] for n in lengths]
    return positions, [[set(range(p + 1)) for p in row] for row in positions]


def draft_oracle(lengths: list[int], block_size: int, floor: bool) -> tuple[Any, Any, Any]:
    """[The anchor as an AR row,] then the block, which reads the history before the anchor and itself."""
    positions, slots, visible = [], [], []
    for n in lengths:
        ar = [(n, n, set(range(n + 1)))] if floor else []
        first = n + len(ar)
        block_slots = set(range(first, first + block_size))
        block = [(n + j, first + j, set(range(n)) | block_slots) for j in range(block_size)]
        positions.append([p for p, _, _ in ar + block])
        slots.append([s for _, s, _ in ar + block])
        visible.append([v for _, _, v in ar + block])
    return positions, slots, visible


def read_slots(visible_BTS: Tensor) -> list[list[set[int]]]:
    return [[set(row_S.nonzero()[:, 0].tolist()) for row_S in rows_TS] for rows_TS in visible_BTS]


def some_ids(batch_size: int, num_rows: int) -> Tensor:
    return torch.arange(batch_size * num_rows).reshape(batch_size, num_rows)


@pytest.mark.parametrize("lengths", [[0], [5], [3, 0, 7]])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_prefill_step_and_verify_are_causal(lengths: list[int], num_rows: int) -> None:
    ids_BT = some_ids(len(lengths), num_rows)
    positions, visible = causal_oracle(lengths, num_rows)
    built = {
        "last chunk": (prefill(ids_BT, lengths), [num_rows - 1]),
        "chunk": (prefill(ids_BT, lengths, last=False), []),
        "verify": (verify_chain(ids_BT, lengths), list(range(num_rows))),
    }
    if num_rows == 1:
        built["step"] = (ar_step(ids_BT, lengths), [0])
    for name, (p, projected) in built.items():
        p.check(lengths)
        assert torch.equal(p.token_ids_BT, ids_BT), name
        assert p.position_ids_BT.tolist() == positions == p.slots_BT.tolist(), name
        assert read_slots(p.visible_BTS) == visible, name
        assert p.logit_rows_R.tolist() == projected, name
        assert p.num_ar_rows == num_rows == p.num_rows
        assert p.num_slots == max(lengths) + num_rows


@pytest.mark.parametrize("floor", [True, False])
@pytest.mark.parametrize("block_size", [2, 3, 8])
@pytest.mark.parametrize("lengths", [[1], [6], [2, 9, 4]])
def test_draft_block(lengths: list[int], block_size: int, floor: bool) -> None:
    anchors_B1 = some_ids(len(lengths), 1)
    p = draft_block(anchors_B1, lengths, block_size, MASK, floor=floor)
    positions, slots, visible = draft_oracle(lengths, block_size, floor)

    p.check(lengths)
    assert p.position_ids_BT.tolist() == positions
    assert p.slots_BT.tolist() == slots
    assert read_slots(p.visible_BTS) == visible
    assert p.num_ar_rows == int(floor)
    expected_ids = [[a] * int(floor) + [a] + [MASK] * (block_size - 1) for a in anchors_B1[:, 0].tolist()]
    assert p.token_ids_BT.tolist() == expected_ids
    # K - 1 drafts from the block's rows 0 .. K-2; with floor the AR row replaces the first of them.
    assert p.logit_rows_R.tolist() == ([0, *range(2, block_size)] if floor else list(range(block_size - 1)))
    # Each projected row predicts the position after its own: no gap and no overlap between them.
    predicted = [positions[0][r] + 1 for r in p.logit_rows_R.tolist()]
    assert predicted == list(range(lengths[0] + 1, lengths[0] + block_size))


@pytest.mark.parametrize("floor", [True, False])
def test_fewer_drafts_project_fewer_rows_of_the_same_block(floor: bool) -> None:
    whole = draft_block(some_ids(1, 1), [4], 8, MASK, floor=floor)
    short = draft_block(some_ids(1, 1), [4], 8, MASK, floor=floor, num_drafts=3)
    assert short.logit_rows_R.tolist() == whole.logit_rows_R.tolist()[: 3 + int(floor)]
    assert torch.equal(short.visible_BTS, whole.visible_BTS)


def changed(p: Pass, row: int, slot: int, value: bool) -> Pass:
    visible_BTS = p.visible_BTS.clone()
    visible_BTS[0, row, slot] = value
    return replace(p, visible_BTS=visible_BTS)


def test_check_sees_an_ar_row_that_reads_the_block() -> None:
    p = draft_block(some_ids(1, 1), [4], 4, MASK, floor=True)
    with pytest.raises(AssertionError, match="AR row sees a diffusion row"):
        changed(p, row=0, slot=6, value=True).check([4])


def test_check_sees_a_row_that_does_not_see_itself() -> None:
    p = verify_chain(some_ids(1, 3), [4])
    with pytest.raises(AssertionError, match="must see itself"):
        changed(p, row=1, slot=5, value=False).check([4])


@pytest.mark.parametrize("slot", [0, 3])
def test_check_sees_a_hole_in_the_history(slot: int) -> None:
    p = verify_chain(some_ids(1, 3), [4])
    with pytest.raises(AssertionError, match="each position up to its own once"):
        changed(p, row=1, slot=slot, value=False).check([4])


def test_check_sees_a_hole_in_what_only_one_sequence_has_committed() -> None:
    p = verify_chain(some_ids(2, 3), [6, 2])
    with pytest.raises(AssertionError, match="each position up to its own once"):
        changed(p, row=1, slot=4, value=False).check([6, 2])


def test_check_sees_a_write_into_the_history() -> None:
    p = verify_chain(some_ids(1, 3), [4])
    with pytest.raises(AssertionError, match="overwrite committed history"):
        p.check([5])


def test_check_sees_stale_scratch() -> None:
    """Built for a history of 4 tokens, run against one of 3: slot 3 holds what an older pass left there."""
    with pytest.raises(AssertionError, match="stale scratch"):
        verify_chain(some_ids(1, 3), [4]).check([3])
    with pytest.raises(AssertionError, match="stale scratch"):
        draft_block(some_ids(1, 1), [4], 4, MASK, floor=False).check([3])


def test_check_sees_an_impossible_split() -> None:
    p = verify_chain(some_ids(1, 3), [4])
    with pytest.raises(AssertionError):
        replace(p, num_ar_rows=4).check([4])


def test_check_looks_at_every_sequence_of_a_batch() -> None:
    p = draft_block(some_ids(2, 1), [4, 2], 4, MASK, floor=True)
    visible_BTS = p.visible_BTS.clone()
    visible_BTS[1, 0, 3] = True
    with pytest.raises(AssertionError, match="AR row sees a diffusion row"):
        replace(p, visible_BTS=visible_BTS).check([4, 2])
