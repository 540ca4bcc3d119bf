"""Attention for compiled layers, registered with transformers under names of their own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthrus.model.attention import attend_folded

COMPILED, EXACT = "orthrus_compiled", "orthrus_compiled_exact"
"""EXACT: in float64 for AR rows, so that they are alike to the last bit in whatever pass they stand."""

SPLIT = "orthrus_row_split"
"""What a module has its `RowSplit` under, for EXACT."""


def _compiled_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    keys_BHSD: Tensor,
    values_BHSD: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `folded_attention`, with a mask (B, 1, T, S) that compiled code folds where it is used."""
    batch, num_heads, num_rows, _size = query_BHTD.shape
    group = num_heads // keys_BHSD.shape[1]
    mask = attention_mask.expand(batch, group, num_rows, -1).reshape(batch, 1, group * num_rows, -1)
    return attend_folded(query_BHTD, keys_BHSD, values_BHSD, mask, scaling), None


def _exact_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    keys_BHSD: Tensor,
    values_BHSD: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same, with the sums of AR rows in float64: rounded to float32, they do not show their order.

    So an AR row comes out alike to the last bit in whatever pass it stands and wherever in the cache its past
    lies. An int8 model needs that: a last bit can push an activation over a rounding step.
    """
    num_ar = getattr(module, SPLIT).num_ar_rows
    scaling = query_BHTD.shape[3] ** -0.5 if scaling is None else scaling
    ar_BHTD, block_BHTD = query_BHTD.split([num_ar, query_BHTD.shape[2] - num_ar], dim=2)
    ar_mask, block_mask = attention_mask.split([num_ar, query_BHTD.shape[2] - num_ar], dim=2)
    outs = []
    if num_ar:
        outs.append(_in_float64(ar_BHTD, keys_BHSD, values_BHSD, ar_mask, scaling))
    if num_ar < query_BHTD.shape[2]:
        out, _none = _compiled_attention(module, block_BHTD, keys_BHSD, values_BHSD, block_mask, scaling)
        outs.append(out)
    return torch.cat(outs, dim=1), None


def _in_float64(
    query_BHTD: Tensor, keys_BHSD: Tensor, values_BHSD: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    batch, num_heads, num_rows, size = query_BHTD.shape
    num_kv = keys_BHSD.shape[1]
    rows = query_BHTD.double().reshape(batch, num_kv, num_heads // num_kv * num_rows, size)
    scores = (rows @ keys_BHSD.double().transpose(2, 3)).view(batch, num_kv, -1, num_rows, keys_BHSD.shape[2])
    scores = (scores * scaling).masked_fill(~mask[:, :, None], -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).float().exp().double()
    sums = weights.sum(-1, keepdim=True).flatten(2, 3)
    out = weights.flatten(2, 3) @ values_BHSD.double() / sums
    return out.view(batch, num_heads, num_rows, size).transpose(1, 2).to(query_BHTD.dtype).contiguous()


ALL_ATTENTION_FUNCTIONS.register(COMPILED, _compiled_attention)
ALL_ATTENTION_FUNCTIONS.register(EXACT, _exact_attention)
