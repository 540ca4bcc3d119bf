"""Attention of a pass on a CPU where several heads share keys: no key is copied.

For a pass of several rows the stock sdpa code copies every key and value of the history once per head of a
group, in each layer. Here the heads of a group become rows of one head; the arithmetic is the same kernel's.
A GPU keeps the stock code: it wants many heads in flight, and copies at the speed of its memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthrus.model.slot_cache import num_kv_heads

NAME = "orthrus_folded_heads"
MOST_FOLDED_ROWS = 128
"""Passes with more rows (chunks of a prompt) would pay for wide masks what they save in products."""

FoldedMasks = dict[int, tuple[Tensor, Tensor]]
"""The masks of one pass, ready for folded heads, by the `id` of the mask that they are made from."""


@contextmanager
def folded_heads(config: PreTrainedConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    """While the context lasts, models of this config attend so; yields what their forward must be given.

    Does nothing where there is nothing to save: other attention than sdpa, no shared keys, no CPU.
    """
    before = config._attn_implementation
    if before != "sdpa" or device.type != "cpu" or num_kv_heads(config) == config.num_attention_heads:
        yield {}
        return
    config._attn_implementation = NAME
    try:
        yield {"folded_masks": {}}
    finally:
        config._attn_implementation = before


def folded_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    keys_BHSD: Tensor,
    values_BHSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    folded_masks: FoldedMasks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: bool mask (B, 1, T, S), H_kv heads of keys; returns (B, T, H, D)."""
    assert attention_mask is not None and folded_masks is not None, "attention outside of a pass"
    assert kwargs.get("softcap") is None, "sdpa has no soft cap"
    _, num_heads, num_rows, _ = query_BHTD.shape
    num_kv = keys_BHSD.shape[1]
    if num_rows > MOST_FOLDED_ROWS:
        out = scaled_dot_product_attention(
            query_BHTD, keys_BHSD, values_BHSD, attention_mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    mask = _folded(attention_mask, num_heads // num_kv, query_BHTD.dtype, folded_masks)
    return attend_folded(query_BHTD, keys_BHSD, values_BHSD, mask, scaling), None


def attend_folded(
    query_BHTD: Tensor, keys_BHSD: Tensor, values_BHSD: Tensor, mask: Tensor, scaling: float | None
) -> Tensor:
    """(B, T, H, D); mask: of `folded_mask`."""
    rows = folded_rows(query_BHTD, keys_BHSD.shape[1])
    out = scaled_dot_product_attention(rows, keys_BHSD, values_BHSD, mask, scale=scaling)
    return unfolded_rows(out, query_BHTD.shape[2])


def folded_rows(query_BHTD: Tensor, num_kv: int) -> Tensor:
    """(B, H_kv, T * H / H_kv, D): the heads of a group that shares keys as rows of one head, row by row."""
    grouped: Tensor = query_BHTD.unflatten(1, (num_kv, -1))
    return grouped.transpose(2, 3).flatten(2, 3)


def unfolded_rows(out: Tensor, num_rows: int) -> Tensor:
    """(B, T, H, D) again, contiguous."""
    grouped: Tensor = out.unflatten(2, (num_rows, -1))
    return grouped.transpose(1, 2).flatten(2, 3).contiguous()


def folded_mask(visible_B1TS: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, T * group, S) for folded rows."""
    mask = torch.zeros(visible_B1TS.shape, dtype=dtype, device=visible_B1TS.device)
    mask.masked_fill_(~visible_B1TS, float("-inf"))
    return mask.repeat_interleave(group, dim=2)


def _folded(visible_B1TS: Tensor, group: int, dtype: torch.dtype, known: FoldedMasks) -> Tensor:
    """The same, made once for all layers: sdpa would convert it in each."""
    if id(visible_B1TS) not in known:
        # The mask itself is kept too, so that nothing else can take its id.
        known[id(visible_B1TS)] = visible_B1TS, folded_mask(visible_B1TS, group, dtype)
    return known[id(visible_B1TS)][1]


ALL_ATTENTION_FUNCTIONS.register(NAME, folded_attention)
