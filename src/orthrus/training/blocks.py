"""Chooses the diffusion blocks that a packed sequence trains, and what each of their rows reads and predicts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.training.packing import PackedSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """A block of `block_size` rows: `num_clean` known tokens (the anchor first), then masks.

    Row j predicts position anchor + j + 1. The last row has no target. Targets of rows below `first_target` have no
    weight, because they may be known tokens. Only a share `clean_share` of the blocks is of this kind. In the others
    only the anchor is known, and every target has weight. With probability `reveal` a mask row shows its true token
    instead, as in a second denoising step; its target does not change. A share `rejected_share` of the blocks moves to
    positions where the view's own drafts are rejected, see `rejected_anchors`.
    """

    block_size: int
    num_clean: int = 1
    first_target: int = 0
    clean_share: float = 1.0
    reveal: float = 0.0
    rejected_share: float = 0.0

    @property
    def num_targets(self) -> int:
        return self.block_size - 1


@dataclass(frozen=True, slots=True, eq=False)
class BlockBatch:
    """B packed sequences with N blocks each, and J = K - 1 targets for each block. Indices are into the sequence.

    token_ids_BT, position_ids_BT, document_BT, answer_BT: the AR rows, as in `PackedSequence`. anchor_BN: index of each
    block's anchor. target_BNJ: index of the AR row (anchor + j) whose prediction is the target of row j. valid_BNJ:
    whether that target is in the same answer and has weight. known_BNK: whether a row shows its true token; the others
    are masks. draws: the random draws of each block, which do not depend on its anchor.
    """

    token_ids_BT: Tensor
    position_ids_BT: Tensor
    document_BT: Tensor
    answer_BT: Tensor
    anchor_BN: Tensor
    target_BNJ: Tensor
    valid_BNJ: Tensor
    known_BNK: Tensor
    draws: "BlockDraws"
    layout: BlockLayout

    def to(self, device: torch.device | str) -> "BlockBatch":
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, draws=BlockDraws(*(draw.to(device) for draw in self.draws)), **moved)


class BlockDraws(NamedTuple):
    """The random draws of blocks.

    used_BN: blocks with an anchor of their own. clean_BN: blocks with `num_clean` known tokens. shown_BNK: rows that
    show their token. moving_BN: blocks that move to where drafts are rejected.
    """

    used_BN: Tensor
    clean_BN: Tensor
    shown_BNK: Tensor
    moving_BN: Tensor

    def of(self, index_BM: Tensor) -> "BlockDraws":
        """The draws of some blocks of each sequence, in the order of their indices."""
        index_BMK = index_BM[..., None].expand(-1, -1, self.shown_BNK.shape[-1])
        return BlockDraws(
            self.used_BN.gather(1, index_BM),
            self.clean_BN.gather(1, index_BM),
            self.shown_BNK.gather(1, index_BMK),
            self.moving_BN.gather(1, index_BM),
        )


_TENSORS = (
    "token_ids_BT",
    "position_ids_BT",
    "document_BT",
    "answer_BT",
    "anchor_BN",
    "target_BNJ",
    "valid_BNJ",
    "known_BNK",
)


def draw_blocks(
    sequences: Sequence[PackedSequence], seeds: Sequence[int], num_anchors: int, layout: BlockLayout
) -> BlockBatch:
    """Draw anchors among the tokens of answers, sorted and without replacement. seeds: one for each sequence.

    A sequence with fewer candidates than `num_anchors` repeats its last one with weight zero. Known tokens are drawn
    after the anchors, so that one seed gives the same anchors in every layout.
    """
    anchors, draws = [], []
    for sequence, seed in zip(sequences, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        anchor_N, used_N = _anchors(sequence, generator, num_anchors)
        anchors.append(anchor_N)
        clean_N = torch.rand(num_anchors, generator=generator) < layout.clean_share
        shown_NK = torch.rand(num_anchors, layout.block_size, generator=generator) < layout.reveal
        num_moving = math.ceil(layout.rejected_share * num_anchors)
        moving_N = torch.randperm(num_anchors, generator=generator) < num_moving
        draws.append((used_N, clean_N, shown_NK, moving_N))
    return _placed(
        torch.stack([s.token_ids_T for s in sequences]),
        torch.stack([s.position_ids_T for s in sequences]),
        torch.stack([s.document_T for s in sequences]),
        torch.stack([s.answer_T for s in sequences]),
        torch.stack(anchors),
        BlockDraws(*(torch.stack(draw) for draw in zip(*draws, strict=True))),
        layout,
    )


def moving_blocks(batch: BlockBatch) -> BlockBatch:
    """Only the blocks that move: the same number of each sequence, in the order of the batch."""
    index_BM = batch.draws.moving_BN.nonzero()[:, 1].view(len(batch.anchor_BN), -1)
    return _moved(batch, batch.anchor_BN.gather(1, index_BM), batch.draws.of(index_BM))


def rejected_anchors(batch: BlockBatch, hit_BMJ: Tensor) -> BlockBatch:
    """The batch after its moving blocks went to where decoding would continue after their first rejected draft.

    hit_BMJ: whether the view's guesses for the targets of `moving_blocks` equal the text's tokens. The first one that
    does not becomes the block's anchor. A block without such a target stays, and so does one whose answer would end
    there. The anchors are sorted again.
    """
    probed = moving_blocks(batch)
    missed_BMJ = probed.valid_BNJ & ~hit_BMJ
    first_BM1 = missed_BMJ.byte().argmax(-1, keepdim=True)
    there_BM = probed.target_BNJ.gather(2, first_BM1)[..., 0] + 1
    after_BM = (there_BM + 1).clamp_max(batch.document_BT.shape[1] - 1)
    goes_on_BM = (after_BM > there_BM) & (
        batch.answer_BT.gather(1, after_BM) == batch.answer_BT.gather(1, probed.anchor_BN)
    )
    there_BM = torch.where(missed_BMJ.any(-1) & goes_on_BM, there_BM, probed.anchor_BN)
    anchor_BN = batch.anchor_BN.masked_scatter(batch.draws.moving_BN, there_BM)
    order_BN = anchor_BN.argsort(dim=1, stable=True)
    return _moved(batch, anchor_BN.gather(1, order_BN), batch.draws.of(order_BN))


def _moved(batch: BlockBatch, anchor_BN: Tensor, draws: BlockDraws) -> BlockBatch:
    sequences = (batch.token_ids_BT, batch.position_ids_BT, batch.document_BT, batch.answer_BT)
    return _placed(*sequences, anchor_BN, draws, batch.layout)


def _placed(
    token_ids_BT: Tensor,
    position_ids_BT: Tensor,
    document_BT: Tensor,
    answer_BT: Tensor,
    anchor_BN: Tensor,
    draws: BlockDraws,
    layout: BlockLayout,
) -> BlockBatch:
    """The batch with blocks at these anchors: their known tokens and targets."""
    clean_BN1 = draws.clean_BN[..., None]
    sequence_length = token_ids_BT.shape[1]
    offset_K = torch.arange(layout.block_size, device=anchor_BN.device)
    index_BNK = anchor_BN[..., None] + offset_K
    # Known tokens and targets must be in the anchor's own answer.
    answers_BNK = _at(answer_BT, index_BNK.clamp_max(sequence_length - 1))
    inside_BNK = (answers_BNK == answer_BT.gather(1, anchor_BN)[..., None]) & (index_BNK < sequence_length)
    known_BNK = (offset_K < torch.where(clean_BN1, layout.num_clean, 1)) | draws.shown_BNK
    target_BNJ = index_BNK[..., :-1]
    valid_BNJ = inside_BNK[..., 1:] & draws.used_BN[..., None]
    valid_BNJ &= offset_K[:-1] >= torch.where(clean_BN1, layout.first_target, 0)
    return BlockBatch(
        token_ids_BT=token_ids_BT,
        position_ids_BT=position_ids_BT,
        document_BT=document_BT,
        answer_BT=answer_BT,
        anchor_BN=anchor_BN,
        target_BNJ=target_BNJ.clamp_max(sequence_length - 1),
        valid_BNJ=valid_BNJ,
        known_BNK=known_BNK & inside_BNK,
        draws=draws,
        layout=layout,
    )


def _at(values_BT: Tensor, index_BNK: Tensor) -> Tensor:
    """The sequence's values at each block's indices, (B, N, K)."""
    return values_BT.gather(1, index_BNK.flatten(1)).view_as(index_BNK)


def _anchors(sequence: PackedSequence, generator: torch.Generator, num_anchors: int) -> tuple[Tensor, Tensor]:
    """(anchor_N, used_N). Candidates are tokens of answers, except the last token of each answer."""
    follows_T = sequence.answer_T >= 0
    follows_T[:-1] &= sequence.answer_T[1:] == sequence.answer_T[:-1]
    follows_T[-1] = False
    candidates = follows_T.nonzero()[:, 0]
    if not len(candidates):
        return torch.zeros(num_anchors, dtype=torch.long), torch.zeros(num_anchors, dtype=torch.bool)
    picked = candidates[torch.randperm(len(candidates), generator=generator)[:num_anchors]].sort().values
    missing = num_anchors - len(picked)
    anchor_N = torch.cat([picked, picked[-1:].expand(missing)])
    return anchor_N, torch.arange(num_anchors) < len(picked)


def context_mask(batch: BlockBatch) -> Tensor:
    """visible_BNT bool: the AR rows that a block reads, which are those of its document before its anchor."""
    same_BNT = batch.document_BT[:, None] == batch.document_BT.gather(1, batch.anchor_BN)[..., None]
    before_BNT = (
        torch.arange(batch.token_ids_BT.shape[1], device=same_BNT.device) < batch.anchor_BN[..., None]
    )
    return same_BNT & before_BNT


def causal_mask(batch: BlockBatch) -> Tensor:
    """visible_BTT bool of the AR rows: causal, within a document. Padding rows see padding rows."""
    same_BTT = batch.document_BT[:, :, None] == batch.document_BT[:, None]
    num_rows = batch.token_ids_BT.shape[1]
    return same_BTT & torch.ones(num_rows, num_rows, dtype=torch.bool, device=same_BTT.device).tril()


def block_inputs(batch: BlockBatch, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """(token_ids, position_ids), each (B, N, K): known tokens and masks, at their true positions."""
    offset_K = torch.arange(batch.layout.block_size, device=batch.anchor_BN.device)
    index_BNK = (batch.anchor_BN[..., None] + offset_K).clamp_max(batch.token_ids_BT.shape[1] - 1)
    token_ids_BNK = _at(batch.token_ids_BT, index_BNK).where(batch.known_BNK, mask_token_id)
    start_BN = batch.position_ids_BT.gather(1, batch.anchor_BN)
    return token_ids_BNK, start_BN[..., None] + offset_K
