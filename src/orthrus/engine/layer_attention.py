"""Attention for compiled layers, registered with transformers under a name of its own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

COMPILED = "orthrus_compiled"


def _compiled_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    keys_BHSD: Tensor,
    values_BHSD: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, one sequence: bool mask (1, 1, T, S); returns (1, T, H, D).

    By our kernel where it knows the dtype: there a row comes out alike to the last bit in whatever pass it
    stands, and wherever in the cache its past lies. An int8 model needs that: a last bit can push an
    activation over a rounding step.
    """
    if query_BHTD.dtype in (torch.float32, torch.bfloat16):
        scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
        out: Tensor = torch.ops.orthrus.few_rows_attention(
            query_BHTD, keys_BHSD, values_BHSD, attention_mask, scale
        )
        return out, None
    out = scaled_dot_product_attention(
        query_BHTD, keys_BHSD, values_BHSD, attention_mask, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(COMPILED, _compiled_attention)
