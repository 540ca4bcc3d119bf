"""Which diffusion blocks a row trains, and what each of their rows reads and predicts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orthrus.training.packing import PackedRow


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """A block of `block_size` rows: `num_clean` known tokens (the anchor first), then masks.

    Row j predicts position anchor + j + 1; the last row is context only. Targets of rows below
    `first_target` carry no weight: rows whose target is a known token anyway. A share `clean_share` of the
    blocks is of this kind, the others know their anchor alone and weigh every target. Each mask row shows
    its true token instead with probability `reveal`, as a second denoising step would see it; targets count
    as before.
    """

    block_size: int
    num_clean: int = 1
    first_target: int = 0
    clean_share: float = 1.0
    reveal: float = 0.0

    @property
    def num_targets(self) -> int:
        return self.block_size - 1


@dataclass(frozen=True, slots=True, eq=False)
class BlockBatch:
    """B packed rows with N blocks each; J = K - 1 targets a block. Indices point into the row (0..T-1).

    token_ids_BT, position_ids_BT, document_BT: the AR rows. anchor_BN: index of each block's anchor.
    target_BNJ: index of the AR row whose prediction target row j imitates (anchor + j).
    valid_BNJ: whether that target lies in the same document and carries weight.
    known_BNK: which rows of a block show their true token; the others are masks.
    """

    token_ids_BT: Tensor
    position_ids_BT: Tensor
    document_BT: Tensor
    anchor_BN: Tensor
    target_BNJ: Tensor
    valid_BNJ: Tensor
    known_BNK: Tensor
    layout: BlockLayout

    def to(self, device: torch.device | str) -> "BlockBatch":
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})


_TENSORS = (
    "token_ids_BT",
    "position_ids_BT",
    "document_BT",
    "anchor_BN",
    "target_BNJ",
    "valid_BNJ",
    "known_BNK",
)


def draw_blocks(
    rows: Sequence[PackedRow], seeds: Sequence[int], num_anchors: int, layout: BlockLayout
) -> BlockBatch:
    """Draw anchors among the assistant's tokens, without replacement and sorted; one seed a row.

    A row with fewer candidates than `num_anchors` repeats its last one with weight zero. What the blocks
    know is drawn after the anchors, so that the same seed gives the same anchors in every layout.
    """
    token_ids_BT = torch.stack([r.token_ids_T for r in rows])
    document_BT = torch.stack([r.document_T for r in rows])
    anchors, used, cleans, shown = [], [], [], []
    for row, seed in zip(rows, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        anchor_N, used_N = _anchors(row, generator, num_anchors)
        anchors.append(anchor_N)
        used.append(used_N)
        cleans.append(torch.rand(num_anchors, generator=generator) < layout.clean_share)
        shown.append(torch.rand(num_anchors, layout.block_size, generator=generator) < layout.reveal)
    anchor_BN, clean_BN1 = torch.stack(anchors), torch.stack(cleans)[..., None]
    row_length = token_ids_BT.shape[1]
    offset_K = torch.arange(layout.block_size)
    index_BNK = anchor_BN[..., None] + offset_K
    # Tokens that are shown or predicted must exist in the anchor's own document.
    documents = _of_row(document_BT, index_BNK.clamp_max(row_length - 1))
    inside_BNK = (documents == document_BT.gather(1, anchor_BN)[..., None]) & (index_BNK < row_length)
    known_BNK = (offset_K < torch.where(clean_BN1, layout.num_clean, 1)) | torch.stack(shown)
    target_BNJ = index_BNK[..., :-1]
    valid_BNJ = inside_BNK[..., 1:] & torch.stack(used)[..., None]
    valid_BNJ &= offset_K[:-1] >= torch.where(clean_BN1, layout.first_target, 0)
    return BlockBatch(
        token_ids_BT=token_ids_BT,
        position_ids_BT=torch.stack([r.position_ids_T for r in rows]),
        document_BT=document_BT,
        anchor_BN=anchor_BN,
        target_BNJ=target_BNJ.clamp_max(row_length - 1),
        valid_BNJ=valid_BNJ,
        known_BNK=known_BNK & inside_BNK,
        layout=layout,
    )


def _of_row(values_BT: Tensor, index_BNK: Tensor) -> Tensor:
    """The row's values at each block's indices, (B, N, K)."""
    return values_BT.gather(1, index_BNK.flatten(1)).view_as(index_BNK)


def _anchors(row: PackedRow, generator: torch.Generator, num_anchors: int) -> tuple[Tensor, Tensor]:
    """(anchor_N, used_N): candidates are assistant tokens that another token of their document follows."""
    follows_T = row.answer_T.clone()
    follows_T[:-1] &= row.document_T[1:] == row.document_T[:-1]
    follows_T[-1] = False
    candidates = follows_T.nonzero()[:, 0]
    if not len(candidates):
        return torch.zeros(num_anchors, dtype=torch.long), torch.zeros(num_anchors, dtype=torch.bool)
    picked = candidates[torch.randperm(len(candidates), generator=generator)[:num_anchors]].sort().values
    missing = num_anchors - len(picked)
    anchor_N = torch.cat([picked, picked[-1:].expand(missing)])
    return anchor_N, torch.arange(num_anchors) < len(picked)


def context_mask(batch: BlockBatch) -> Tensor:
    """visible_BNT bool: the AR rows that a block reads, those of its document strictly before its anchor."""
    same_BNT = batch.document_BT[:, None] == batch.document_BT.gather(1, batch.anchor_BN)[..., None]
    before_BNT = (
        torch.arange(batch.token_ids_BT.shape[1], device=same_BNT.device) < batch.anchor_BN[..., None]
    )
    return same_BNT & before_BNT


def causal_mask(batch: BlockBatch) -> Tensor:
    """visible_BTT bool of the AR rows: causal, and blind to other documents. Padding rows see themselves."""
    same_BTT = batch.document_BT[:, :, None] == batch.document_BT[:, None]
    num_rows = batch.token_ids_BT.shape[1]
    return same_BTT & torch.ones(num_rows, num_rows, dtype=torch.bool, device=same_BTT.device).tril()


def block_inputs(batch: BlockBatch, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """(token_ids, position_ids), each (B, N, K): known tokens and masks at their true positions."""
    offset_K = torch.arange(batch.layout.block_size, device=batch.anchor_BN.device)
    index_BNK = (batch.anchor_BN[..., None] + offset_K).clamp_max(batch.token_ids_BT.shape[1] - 1)
    token_ids_BNK = _of_row(batch.token_ids_BT, index_BNK).where(batch.known_BNK, mask_token_id)
    start_BN = batch.position_ids_BT.gather(1, batch.anchor_BN)
    return token_ids_BNK, start_BN[..., None] + offset_K
