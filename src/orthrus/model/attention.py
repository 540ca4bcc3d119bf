"""Attention of a pass, span by span, for the eager runner. It is the slow oracle of `kernels/attention.cpp`.

It is registered with transformers under `NAME`, so that stock attention modules call it. AR rows and diffusion rows of
a span are computed separately, so no product of an AR row uses a slot that a diffusion row wrote.

Letters: Q query rows of a group, N slots that they may read, D head dimension.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthrus.model.passes import Pass, Span
from orthrus.model.pool import SlotPool

NAME = "orthrus_spans"


class _Group(NamedTuple):
    """Rows of one span and one view, with the slots of the pool that they may read, as indices or as a slice."""

    rows: slice
    slots: slice | Tensor
    visible_QN: Tensor
    key_positions_N: Tensor
    query_positions_Q: Tensor


class RunningPass:
    """The state of a pass while it runs through the layers: the slots of its keys, and which rows read which slots.

    windows: for each layer, the number of positions that a row reads, its own included; None for all. It has the
    interface of the transformers cache that the stock forward uses (`update`, `get_seq_length`).
    """

    is_compileable = False

    def __init__(self, p: Pass, pool: SlotPool, windows: list[int | None]) -> None:
        self.pass_, self.pool, self.windows = p, pool, windows
        self._groups = [group for span in p.spans for group in _groups(p, span)]
        self._masks: dict[tuple[int, int | None, int, torch.dtype], Tensor] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the pass's rows (1, H, R, D), and return the pool's stores of this layer (1, H, S, D)."""
        stores = self.pool.keys[layer_idx], self.pool.values[layer_idx]
        for store, new in zip(stores, (keys, values), strict=True):
            store.index_copy_(2, self.pass_.slots_R, new.to(store.dtype))
        return stores

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def groups(self, window: int | None, fold: int, dtype: torch.dtype) -> list[tuple[_Group, Tensor]]:
        """Each group with its additive mask (Q * fold, N), created once for all layers that share it."""
        found = []
        for number, group in enumerate(self._groups):
            key = number, window, fold, dtype
            if key not in self._masks:
                visible_QN = group.visible_QN
                if window is not None:
                    back_QN = group.query_positions_Q[:, None] - group.key_positions_N
                    visible_QN = visible_QN & (back_QN < window)
                mask_QN = torch.zeros(visible_QN.shape, dtype=dtype, device=visible_QN.device)
                mask_QN.masked_fill_(~visible_QN, -torch.inf)
                self._masks[key] = mask_QN.repeat_interleave(fold, 0)
            found.append((group, self._masks[key]))
        return found


def _groups(p: Pass, span: Span) -> list[_Group]:
    part, device = span.part, p.token_ids_R.device
    places_N = span.places
    groups = []
    for rows, own, num_tail in (
        (span.ar_rows, slice(part.num_ar), part.num_ar),
        (span.draft_rows, slice(part.num_ar, part.num_rows), part.num_rows),
    ):
        num_queries = rows.stop - rows.start
        if not num_queries:
            continue
        tail_QT = np.tri(num_tail, dtype=np.bool_) if part.tail_II is None else part.tail_II[own, :num_tail]
        visible_QN = np.concatenate([np.ones((num_queries, span.length), dtype=np.bool_), tail_QT], axis=1)
        read_N = places_N[: span.length + num_tail]
        positions_N = np.concatenate(
            [np.arange(span.length), span.length + np.array(part.offsets[:num_tail])]
        )
        in_a_row = bool((np.diff(read_N) == 1).all())
        groups.append(
            _Group(
                rows,
                slice(int(read_N[0]), int(read_N[-1]) + 1)
                if in_a_row
                else torch.from_numpy(read_N).to(device),
                torch.from_numpy(visible_QN).to(device),
                torch.from_numpy(positions_N).to(device),
                p.position_ids_R[rows],
            )
        )
    return groups


def span_attention(
    module: nn.Module,
    query_1HRD: Tensor,
    keys_1HSD: Tensor,
    values_1HSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    running: RunningPass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention behind transformers' interface. Keys and values are the pool's stores. Returns (1, R, H, D)."""
    assert running is not None, "attention outside of a pass"
    num_kv = keys_1HSD.shape[1]
    fold = query_1HRD.shape[1] // num_kv
    out_1RHD = query_1HRD.new_empty((1, query_1HRD.shape[2], query_1HRD.shape[1], values_1HSD.shape[3]))
    window = running.windows[int(module.layer_idx)]  # type: ignore[arg-type]
    for group, mask in running.groups(window, fold, query_1HRD.dtype):
        # The heads that share keys become rows of one head, so that no key is copied for each head.
        query_1HQD = query_1HRD[:, :, group.rows].unflatten(1, (num_kv, fold)).transpose(2, 3).flatten(2, 3)
        keys, values = (
            (
                store[:, :, group.slots]
                if isinstance(group.slots, slice)
                else store.index_select(2, group.slots)
            ).to(query_1HRD.dtype)
            for store in (keys_1HSD, values_1HSD)
        )
        if softcap is None:
            out = scaled_dot_product_attention(query_1HQD, keys, values, mask, scale=scaling)
        else:
            scale = query_1HRD.shape[-1] ** -0.5 if scaling is None else scaling
            scores = softcap * torch.tanh(query_1HQD @ keys.mT * scale / softcap) + mask
            out = scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
        out_1RHD[:, group.rows] = out.unflatten(2, (-1, fold)).transpose(2, 3).flatten(1, 2).transpose(1, 2)
    return out_1RHD, None


ALL_ATTENTION_FUNCTIONS.register(NAME, span_attention)
