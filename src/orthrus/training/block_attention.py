"""Attention of isolated blocks over a frozen context, for the training pass of the diffusion view.

Each query reads the AR rows that its block may see and its own block, both in one softmax. The AR keys
take part as constants: no gradients are computed for them, which is most of what a dense mask over all
keys would spend. Registered with transformers under `NAME`, so the stock attention modules call it. This is
the dense code, for any device; `flex_blocks` has the sparse one for GPUs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NAME = "orthrus_blocks"


@dataclass(frozen=True, slots=True, eq=False)
class BlockContext:
    """What the blocks of a batch read: per layer the AR rows' keys and values (B, H_kv, T, D), frozen.

    full, windowed: what the N * K = Q query rows may read, in layers that see everything and in those with a
    sliding window. Additive masks (B, Q, T) over the AR rows for the dense code, a BlockMask over AR rows and
    block rows for the sparse one.
    """

    keys: list[Tensor]
    values: list[Tensor]
    full: "Tensor | BlockMask"
    windowed: "Tensor | BlockMask"
    windows: list[int | None]
    block_size: int

    def mask(self, layer: int) -> "Tensor | BlockMask":
        return self.full if self.windows[layer] is None else self.windowed


def block_attention(
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
    """transformers attention interface; returns (B, Q, H, D). `block_context` arrives through the forward."""
    assert block_context is not None, "block attention runs only inside a training pass"
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    batch, heads, rows, dim = query_BHQD.shape
    kv_heads, size = key_BHQD.shape[1], block_context.block_size
    scaling = dim**-0.5 if scaling is None else scaling
    query = (query_BHQD * scaling).reshape(batch, kv_heads, heads // kv_heads, rows, dim)

    context_k, context_v = block_context.keys[layer], block_context.values[layer]
    bias_BQT = block_context.mask(layer)
    assert isinstance(bias_BQT, Tensor), "the dense code takes additive masks"
    # (B, H_kv, G * Q, T): one matrix product per kv head serves its whole group of query heads.
    context_scores = (query.flatten(2, 3) @ context_k.mT).view(batch, kv_heads, -1, rows, context_k.shape[2])
    blocked = query.unflatten(3, (-1, size))
    block_k = key_BHQD.unflatten(2, (-1, size))[:, :, None]
    block_v = value_BHQD.unflatten(2, (-1, size))[:, :, None]
    block_scores = (blocked @ block_k.mT).flatten(3, 4)
    if softcap is not None:
        context_scores = softcap * torch.tanh(context_scores / softcap)
        block_scores = softcap * torch.tanh(block_scores / softcap)
    scores = torch.cat([context_scores + bias_BQT[:, None, None], block_scores], dim=-1)
    probs = scores.softmax(-1)
    context_probs, block_probs = probs.split([context_k.shape[2], size], dim=-1)
    out = (context_probs.flatten(2, 3) @ context_v).view(batch, kv_heads, -1, rows, dim)
    out = out + (block_probs.unflatten(3, (-1, size)) @ block_v).flatten(3, 4)
    return out.reshape(batch, heads, rows, dim).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, block_attention)
