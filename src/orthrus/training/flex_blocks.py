"""The attention of `block_attention` on FlexAttention, which skips tiles that no query may read.

Keys are the frozen AR rows, followed by the block rows themselves. Most tiles of that matrix are empty, because a block
reads one document up to its anchor, and itself. The masks of a batch are built once, and all layers share them. The
code is compiled on an accelerator. On a CPU it runs uncompiled, for tests of the forward pass.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthrus.errors import UserInputError
from orthrus.training.block_attention import BlockContext
from orthrus.training.blocks import BlockBatch
from orthrus.training.recipe import AttentionKind

NAME = "orthrus_flex_blocks"
# On these devices torch computes no gradients through FlexAttention.
_FORWARD_ONLY = ("cpu", "mps")
# The smallest head dimension that its kernels support.
_MIN_HEAD_DIM = 16


def check_attention(kind: AttentionKind, device: torch.device) -> None:
    """Raises UserInputError for an attention that cannot train on `device`."""
    if kind == "flex" and device.type in _FORWARD_ONLY:
        raise UserInputError(
            f"attention flex cannot train on {device.type}: FlexAttention has no backward pass there; leave "
            "attention at auto, or set it to dense."
        )


def pick_attention(kind: AttentionKind, device: torch.device, head_dim: int) -> Literal["dense", "flex"]:
    """The code for tensors on `device`: auto is flex on CUDA if its kernels support the head dimension."""
    if kind == "auto":
        return "flex" if device.type == "cuda" and head_dim >= _MIN_HEAD_DIM else "dense"
    return kind


def flex_masks(batch: BlockBatch, window: int | None) -> tuple[BlockMask, BlockMask]:
    """(full, windowed) BlockMasks of all N * K = Q block rows over the T AR rows and the Q block rows.

    If the model has no window, both are the same mask.
    """
    full = _block_mask(batch, None)
    return full, full if window is None else _block_mask(batch, window)


def _block_mask(batch: BlockBatch, window: int | None) -> BlockMask:
    num_sequences, num_rows = batch.token_ids_BT.shape
    size, device = batch.layout.block_size, batch.anchor_BN.device
    anchor_BQ = batch.anchor_BN.repeat_interleave(size, dim=1)
    num_queries = anchor_BQ.shape[1]
    document_BQ = batch.document_BT.gather(1, anchor_BQ)
    position_BQ = batch.position_ids_BT.gather(1, anchor_BQ) + torch.arange(num_queries, device=device) % size
    # The first position inside the window, or position 0 without a window.
    earliest_BQ = torch.zeros_like(position_BQ) if window is None else position_BQ - window + 1
    block_Q = torch.arange(num_queries, device=device) // size
    # Keys: the AR rows, then the block rows. Only the comparison of `block_S` and `block_Q` makes block rows visible,
    # because no anchor has an index after the AR rows.
    block_S = torch.cat([torch.full((num_rows,), -1, device=device), block_Q])
    document_BS = torch.nn.functional.pad(batch.document_BT, (0, num_queries))
    position_BS = torch.nn.functional.pad(batch.position_ids_BT, (0, num_queries))

    # It captures only tensors. Numbers would be compiled in, and a new number would compile it again.
    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        context = (kv < anchor_BQ[b, q]) & (document_BS[b, kv] == document_BQ[b, q])
        context = context & (position_BS[b, kv] >= earliest_BQ[b, q])
        return context | (block_S[kv] == block_Q[q])

    return create_block_mask(
        visible, num_sequences, None, num_queries, num_rows + num_queries, device=str(device)
    )


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention)


def flex_block_attention(
    module: nn.Module,
    query_BHQD: Tensor,
    key_BHQD: Tensor,
    value_BHQD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    block_context: BlockContext | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention behind transformers' interface. Returns (B, Q, H, D). `block_context` comes through the forward."""
    assert block_context is not None, "block attention runs only inside a training pass"
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    mask = block_context.mask(layer)
    assert isinstance(mask, BlockMask), "the sparse code takes block masks"
    context_k, context_v = block_context.keys[layer].detach(), block_context.values[layer].detach()
    # Under autocast, norms give float32 and projections bfloat16. The kernels need one precision.
    dtype, device = context_v.dtype, query_BHQD.device
    key_BHSD = torch.cat([context_k.to(dtype), key_BHQD.to(dtype)], dim=2)
    value_BHSD = torch.cat([context_v, value_BHQD.to(dtype)], dim=2)

    attend = flex_attention if device.type in _FORWARD_ONLY else _compiled()
    with torch.autocast(device.type, enabled=False):
        out_BHQD: Tensor = attend(
            query_BHQD.to(dtype),
            key_BHSD,
            value_BHSD,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=mask,
            scale=scaling,
            enable_gqa=query_BHQD.shape[1] != key_BHQD.shape[1],
        )
    return out_BHQD.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, flex_block_attention)
