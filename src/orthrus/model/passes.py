"""The one primitive: a pass over rows, and the pure functions that build passes.

Rows `[0, num_ar_rows)` go through the AR view, the others through the diffusion view. Each row writes its
keys and values into its own slot and reads exactly the slots that its row of `visible` allows. AR rows
never see a slot that a diffusion row wrote: that is why the output is lossless.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MASK_EMBEDDING = -1
"""Token id that stands for the view's own mask embedding, for views without a mask token id."""


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """token_ids_BT, position_ids_BT, slots_BT: int64; visible_BTS: bool, S the slots that are read.

    `logit_rows_R` (int64) names the rows that are projected to the vocabulary together.
    The diffusion rows are blocks of `block_size` rows each, one after the other (0 where there are none).
    is_prompt: a chunk of the prompt, which goes in alike under every strategy.
    """

    token_ids_BT: Tensor
    position_ids_BT: Tensor
    slots_BT: Tensor
    visible_BTS: Tensor
    num_ar_rows: int
    logit_rows_R: Tensor
    block_size: int = 0
    is_prompt: bool = False

    @property
    def num_rows(self) -> int:
        return self.token_ids_BT.shape[1]

    @property
    def num_slots(self) -> int:
        return self.visible_BTS.shape[2]

    def check(self, lengths: list[int]) -> None:
        """Assert the invariants against the committed `lengths`; one host synchronisation per tensor.

        Every row sees its own slot and what all sequences have committed, AR rows see no diffusion slot of
        this pass and no older scratch, a block sees itself whole and no other block, and nobody writes into
        the history. Each row reads one slot for every position up to its own (an AR row) or up to the end of
        its block: so no row reads two branches.
        """
        # By numpy: the arrays are small, and its calls take a third of PyTorch's.
        visible_BTS, slots_BT, positions_BT = (
            tensor.cpu().numpy() for tensor in (self.visible_BTS, self.slots_BT, self.position_ids_BT)
        )
        num_rows, num_slots, num_ar = *visible_BTS.shape[1:], self.num_ar_rows
        assert 0 <= num_ar <= num_rows
        lengths_B1 = np.array(lengths)[:, None]
        assert (slots_BT >= lengths_B1).all(), "a row would overwrite committed history"
        # What all sequences have committed: one look at it, so that the rest does not grow with the context.
        shared = min(*lengths, num_slots)
        assert visible_BTS[:, :, :shared].all(), "a row must see each position up to its own once"
        visible_BTS, slots_BT, lengths_B1 = visible_BTS[:, :, shared:], slots_BT - shared, lengths_B1 - shared
        sequence_B1, row_T = np.arange(len(lengths))[:, None], np.arange(num_rows)
        assert visible_BTS[sequence_B1, row_T, slots_BT].all(), "a row must see itself"
        ar_BS = np.arange(num_slots - shared) < lengths_B1
        ar_BS[sequence_B1, slots_BT[:, :num_ar]] = True
        assert not (visible_BTS[:, :num_ar] > ar_BS[:, None]).any(), (
            "an AR row sees a diffusion row or stale scratch"
        )
        any_BS = ar_BS
        any_BS[sequence_B1, slots_BT] = True
        assert not (visible_BTS > any_BS[:, None]).any(), "a row sees stale scratch"
        last_BT = positions_BT
        if num_ar < num_rows:
            slots_BD, positions_BD = slots_BT[:, num_ar:], positions_BT[:, num_ar:]
            block_D = np.arange(num_rows - num_ar) // self.block_size
            seen_BDD = visible_BTS[sequence_B1[..., None], row_T[num_ar:, None], slots_BD[:, None]]
            assert (seen_BDD == (block_D[:, None] == block_D)).all(), (
                "a block sees another block, or not the whole of itself"
            )
            ends_BD = positions_BD[:, (block_D + 1) * self.block_size - 1]
            last_BT = np.concatenate([last_BT[:, :num_ar], ends_BD], axis=1)
        assert (visible_BTS.sum(2) == last_BT + 1 - shared).all(), (
            "a row must see each position up to its own once"
        )


def _causal(
    token_ids_BT: Tensor, lengths: list[int], first_logit_row: int = 0, *, is_prompt: bool = False
) -> Pass:
    """AR rows that continue each history; slot = position."""
    num_rows, device = token_ids_BT.shape[1], token_ids_BT.device
    starts_B1 = torch.tensor(lengths, device=device)[:, None]
    slots_BT = starts_B1 + torch.arange(num_rows, device=device)
    visible_BTS = torch.arange(max(lengths) + num_rows, device=device) <= slots_BT[..., None]
    logit_rows_R = torch.arange(first_logit_row, num_rows, device=device)
    return Pass(token_ids_BT, slots_BT, slots_BT, visible_BTS, num_rows, logit_rows_R, is_prompt=is_prompt)


def prefill(token_ids_BT: Tensor, lengths: list[int], *, last: bool = True) -> Pass:
    """A chunk of the prompt; only the `last` chunk projects, and only its last row."""
    num_rows = token_ids_BT.shape[1]
    return _causal(token_ids_BT, lengths, num_rows - int(last), is_prompt=True)


def ar_step(token_ids_B1: Tensor, lengths: list[int]) -> Pass:
    """Plain decoding: one AR row per sequence."""
    return _causal(token_ids_B1, lengths)


def verify_chain(token_ids_BT: Tensor, lengths: list[int]) -> Pass:
    """The anchor and its drafts as AR rows, all projected: row i judges draft i + 1."""
    return _causal(token_ids_BT, lengths)


def draft_block(
    anchor_ids_B1: Tensor,
    lengths: list[int],
    block_size: int,
    mask_token_id: int,
    *,
    floor: bool,
    num_drafts: int | None = None,
) -> Pass:
    """One diffusion block: the anchor and K - 1 masks, at the positions that follow the history.

    Block rows read the history strictly before the anchor and their whole own block, both ways. Row j
    predicts position anchor + j + 1. In training the last row only serves the others as context, so K rows
    give K - 1 drafts. With `floor` an AR row of the anchor goes first: it writes the anchor's history and
    decides the next token whatever the drafts are worth; the block's own first guess is then not needed,
    which leaves K - 2 drafts. `num_drafts` projects fewer of them, or that of the last row too, which has
    learnt to guess where blocks were longer in training. Source: arXiv 2605.12825, section 3.
    """
    batch_size, device = anchor_ids_B1.shape[0], anchor_ids_B1.device
    num_ar = int(floor)
    num_drafts = block_size - 1 - num_ar if num_drafts is None else num_drafts
    starts_B1 = torch.tensor(lengths, device=device)[:, None]
    masks = anchor_ids_B1.new_full((batch_size, block_size - 1), mask_token_id)
    block_T = torch.arange(block_size, device=device)
    slot_S = torch.arange(max(lengths) + num_ar + block_size, device=device)
    block_BS = (slot_S >= starts_B1 + num_ar) & (slot_S < starts_B1 + num_ar + block_size)
    visible_BTS = ((slot_S < starts_B1) | block_BS)[:, None].expand(-1, block_size, -1)
    logit_rows_R = torch.arange(num_drafts, device=device)
    if floor:
        visible_BTS = torch.cat([(slot_S <= starts_B1)[:, None], visible_BTS], dim=1)
        # The AR row, then the block from its second row on: row 0's guess is what the AR row decides.
        logit_rows_R = torch.cat([logit_rows_R.new_zeros(1), logit_rows_R + 2])
    return Pass(
        token_ids_BT=torch.cat([anchor_ids_B1] * num_ar + [anchor_ids_B1, masks], dim=1),
        position_ids_BT=starts_B1 + torch.cat([block_T[:num_ar], block_T]),
        slots_BT=starts_B1 + torch.arange(num_ar + block_size, device=device),
        visible_BTS=visible_BTS,
        num_ar_rows=num_ar,
        logit_rows_R=logit_rows_R,
        block_size=block_size,
    )


def verify_tree(token_ids_1T: Tensor, parents: Sequence[int], lengths: list[int]) -> Pass:
    """The anchor (row 0) and the nodes of a draft tree as AR rows, all projected.

    parents: per node, the row of its parent, which comes before it. A node stands as many positions after the
    anchor as it is deep, and reads the history, its own ancestors and itself; row r writes slot length + r.
    Source: the tree attention of arXiv 2305.09781, section 4.
    """
    return fused(token_ids_1T, parents, lengths, block_rows=(), block_size=1, mask_token_id=MASK_EMBEDDING)


def fused(
    token_ids_1T: Tensor,
    parents: Sequence[int],
    lengths: list[int],
    block_rows: Sequence[int],
    block_size: int,
    mask_token_id: int,
    given: Sequence[Sequence[int]] = (),
) -> Pass:
    """The rows of `verify_tree`, then one diffusion block of K rows for each of `block_rows`.

    Block i is anchored at AR row block_rows[i] = j: it starts with that row's token, goes on with the clean
    tokens given[i] (at most K - 1) and is masks from there on. It reads the history, the AR rows on j's
    path strictly before j, and itself: what `draft_block` would read if that path had been committed. With T
    AR rows it takes the rows from T + i * K on, and the positions from j's on. `logit_rows_R`: the AR rows.
    """
    (length,), device, num_ar = lengths, token_ids_1T.device, token_ids_1T.shape[1]
    assert len(parents) == num_ar - 1, "one parent for each row but the anchor"
    assert not given or len(given) == len(block_rows), "given tokens are for all blocks or for none"
    num_rows = num_ar + len(block_rows) * block_size
    depths, clean = [0], []
    # One byte for each row of the pass that a row reads: on the host, since the tree is known there.
    reads = [bytearray(num_rows)]
    reads[0][0] = 1
    for row, parent in enumerate(parents, start=1):
        assert 0 <= parent < row, "parents come first"
        depths.append(depths[parent] + 1)
        reads.append(bytearray(reads[parent]))
        reads[row][row] = 1
    offsets = depths.copy()
    for block, anchor_row in enumerate(block_rows):
        block_read = bytearray(reads[anchor_row])
        block_read[anchor_row] = 0
        own = slice(num_ar + block * block_size, num_ar + (block + 1) * block_size)
        block_read[own] = b"\1" * block_size
        reads += [block_read] * block_size
        offsets += range(depths[anchor_row], depths[anchor_row] + block_size)
        known = list(given[block]) if given else []
        assert len(known) < block_size, "a block has no room for the given tokens"
        clean += known + [mask_token_id] * (block_size - 1 - len(known))
    tail_RR = torch.frombuffer(bytearray().join(reads), dtype=torch.bool).view(num_rows, num_rows).to(device)
    anchors_M1 = token_ids_1T[0, list(block_rows)][:, None]
    clean_MJ = torch.tensor(clean, dtype=torch.long, device=device).view(len(block_rows), block_size - 1)
    return Pass(
        token_ids_BT=torch.cat([token_ids_1T, torch.cat([anchors_M1, clean_MJ], dim=1).view(1, -1)], dim=1),
        position_ids_BT=torch.tensor([offsets], device=device) + length,
        slots_BT=torch.arange(length, length + num_rows, device=device)[None],
        visible_BTS=torch.cat([tail_RR.new_ones(num_rows, length), tail_RR], dim=1)[None],
        num_ar_rows=num_ar,
        logit_rows_R=torch.arange(num_ar, device=device),
        block_size=block_size if block_rows else 0,
    )
