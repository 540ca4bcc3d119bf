"""Attention for compiled layers, registered with transformers under its own name."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthrus.base.families import layer_windows

COMPILED = "orthrus_compiled"


def _compiled_attention(
    module: nn.Module,
    query_1HRD: Tensor,
    keys_1HPDW: Tensor,
    values_1HSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    plan_P: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention by our kernel, behind transformers' attention interface. Returns (1, R, H, D). D: head dimension.

    keys_1HPDW, values_1HSD: the pool's stores; keys are transposed, see `pool.transposed`. A row comes out equal to the
    last bit in any pass, wherever in the pool its history lies. An int8 model needs that, because a last bit can push
    an activation over a rounding step.
    """
    assert plan_P is not None, "attention outside of a pass"
    scale = query_1HRD.shape[-1] ** -0.5 if scaling is None else scaling
    window = layer_windows(module.config)[int(module.layer_idx)]  # type: ignore[arg-type]
    out: Tensor = torch.ops.orthrus.paged_attention(
        query_1HRD, keys_1HPDW, values_1HSD, plan_P, scale, window or 0, softcap or 0.0
    )
    return out, None


ALL_ATTENTION_FUNCTIONS.register(COMPILED, _compiled_attention)
