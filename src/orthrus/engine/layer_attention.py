"""Attention for compiled layers, registered with transformers under names of their own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthrus.model.attention import attend_folded, folded_rows, unfolded_rows

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
    """As `folded_attention`, with a mask of `folded_mask`: made once a pass, not in each layer."""
    return attend_folded(query_BHTD, keys_BHSD, values_BHSD, attention_mask, scaling), None


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
    num_rows = query_BHTD.shape[2]
    num_ar = getattr(module, SPLIT).num_ar_rows
    group = query_BHTD.shape[1] // keys_BHSD.shape[1]
    ar_BHTD, block_BHTD = query_BHTD.split([num_ar, num_rows - num_ar], dim=2)
    ar_mask, block_mask = attention_mask.split([group * num_ar, group * (num_rows - num_ar)], dim=2)
    outs = []
    if num_ar:
        outs.append(_in_float64(ar_BHTD, keys_BHSD, values_BHSD, ar_mask, scaling))
    if num_ar < num_rows:
        outs.append(attend_folded(block_BHTD, keys_BHSD, values_BHSD, block_mask, scaling))
    return torch.cat(outs, dim=1), None


def _in_float64(
    query_BHTD: Tensor, keys_BHSD: Tensor, values_BHSD: Tensor, mask: Tensor, scaling: float | None
) -> Tensor:
    """`attend_folded`, with both sums in float64; what lies between is float32, number by number."""
    rows = folded_rows(query_BHTD, keys_BHSD.shape[1]).double()
    scores = (rows @ keys_BHSD.double().transpose(2, 3)).float()
    scores = scores * (rows.shape[-1] ** -0.5 if scaling is None else scaling) + mask
    weights = (scores - scores.amax(-1, keepdim=True)).exp().double()
    out = (weights @ values_BHSD.double()).float() / weights.sum(-1, keepdim=True).float()
    return unfolded_rows(out, query_BHTD.shape[2]).to(query_BHTD.dtype)


ALL_ATTENTION_FUNCTIONS.register(COMPILED, _compiled_attention)
ALL_ATTENTION_FUNCTIONS.register(EXACT, _exact_attention)
