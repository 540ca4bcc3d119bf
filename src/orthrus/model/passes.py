"""The one primitive: a pass over rows, and the pure functions that build passes.

Rows `[0, num_ar_rows)` go through the AR view, the others through the diffusion view. Each row writes its
keys and values into its own slot and reads exactly the slots that its row of `visible` allows. AR rows
never see a slot that a diffusion row wrote: that is why the output is lossless.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MASK_EMBEDDING = -1
"""Token id that stands for the view's own mask embedding, for views without a mask token id."""


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """token_ids_BT, position_ids_BT, slots_BT: int64; visible_BTS: bool, S the slots that are read.

    `logit_rows_R` (int64) names the rows that are projected to the vocabulary: nobody pays for the rest.
    """

    token_ids_BT: Tensor
    position_ids_BT: Tensor
    slots_BT: Tensor
    visible_BTS: Tensor
    num_ar_rows: int
    logit_rows_R: Tensor

    @property
    def num_rows(self) -> int:
        return self.token_ids_BT.shape[1]

    @property
    def num_slots(self) -> int:
        return self.visible_BTS.shape[2]

    def check(self, lengths: list[int]) -> None:
        """Assert the invariants against the committed `lengths`; one host synchronisation per tensor.

        Every row sees its own slot, AR rows see no diffusion slot of this pass and no older scratch,
        and nobody writes into the history.
        """
        num_rows, num_slots = self.visible_BTS.shape[1:]
        lengths_B1 = torch.tensor(lengths, device=self.slots_BT.device)[:, None]
        assert (self.slots_BT >= lengths_B1).all(), "a row would overwrite committed history"
        assert self.visible_BTS.gather(2, self.slots_BT[..., None]).all(), "a row must see itself"
        allowed_BS = torch.arange(num_slots, device=lengths_B1.device) < lengths_B1
        ar_BS = allowed_BS.scatter(1, self.slots_BT[:, : self.num_ar_rows], True)
        any_BS = ar_BS.scatter(1, self.slots_BT, True)
        assert not (self.visible_BTS[:, : self.num_ar_rows] & ~ar_BS[:, None]).any(), (
            "an AR row sees a diffusion row or stale scratch"
        )
        assert not (self.visible_BTS & ~any_BS[:, None]).any(), "a row sees stale scratch"
        assert 0 <= self.num_ar_rows <= num_rows


def _causal(token_ids_BT: Tensor, lengths: list[int], first_logit_row: int = 0) -> Pass:
    """AR rows that continue each history; slot = position."""
    num_rows, device = token_ids_BT.shape[1], token_ids_BT.device
    starts_B1 = torch.tensor(lengths, device=device)[:, None]
    slots_BT = starts_B1 + torch.arange(num_rows, device=device)
    visible_BTS = torch.arange(max(lengths) + num_rows, device=device) <= slots_BT[..., None]
    logit_rows_R = torch.arange(first_logit_row, num_rows, device=device)
    return Pass(token_ids_BT, slots_BT, slots_BT, visible_BTS, num_rows, logit_rows_R)


def prefill(token_ids_BT: Tensor, lengths: list[int], *, last: bool = True) -> Pass:
    """A chunk of the prompt; only the `last` chunk projects, and only its last row."""
    num_rows = token_ids_BT.shape[1]
    return _causal(token_ids_BT, lengths, num_rows - int(last))


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
    predicts position anchor + j + 1 and the last row only serves the others as context, so K rows give
    K - 1 drafts. With `floor` an AR row of the anchor goes first: it writes the anchor's history and
    decides the next token whatever the drafts are worth; the block's own first guess is then not needed,
    which leaves K - 2 drafts. `num_drafts` projects fewer of them. Source: arXiv 2605.12825, section 3.
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
    )
