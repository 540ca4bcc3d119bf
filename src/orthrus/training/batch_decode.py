"""Plain decoding of many prompts at once, for corpora: rows come and go, the batch stays full."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.config import SamplingParams
from orthrus.decoding.sampling import draw_from_generator, filtered_probs, greedy_tokens
from orthrus.model.dual_view import DualView
from orthrus.model.passes import ar_step, prefill
from orthrus.model.slot_cache import SlotCache

_ADMITTED = 16
"""Prompts that are fed in together: one at a time would take longer than their answers."""


class Request(NamedTuple):
    """A prompt and how to answer it; `key` comes back with the answer."""

    key: int
    prompt_ids: list[int]
    sampling: SamplingParams


class Answer(NamedTuple):
    """New tokens, the end-of-sequence token included; `finished` is False when the limit cut it off."""

    key: int
    token_ids: list[int]
    finished: bool


@dataclass
class _Row:
    request: Request
    next_id: int
    token_ids: list[int] = field(default_factory=list)


@torch.inference_mode()
def decode_batch(
    dual: DualView,
    requests: Iterable[Request],
    *,
    batch_size: int,
    max_new_tokens: int,
    max_prompt_tokens: int,
    eos_token_ids: frozenset[int],
    seed: int,
) -> Iterator[Answer]:
    """Answer all requests with the AR view, `batch_size` at a time; answers come in the order they end.

    Sampled rows draw from one generator, so the text depends on the batch: generate once and store.
    """
    waiting = iter(requests)
    cache = dual.new_cache(max_prompt_tokens + max_new_tokens, batch_size)
    generator = torch.Generator(device=dual.device).manual_seed(seed)
    rows: list[_Row | None] = [None] * batch_size
    least = min(_ADMITTED, max(1, batch_size // 4))
    while True:
        free = [i for i, row in enumerate(rows) if row is None]
        if len(free) >= least:
            for i in range(0, len(free), _ADMITTED):
                found = list(zip(free[i : i + _ADMITTED], waiting, strict=False))
                _admit(dual, cache, found)
                for place, request in found:
                    rows[place] = _Row(request, request.prompt_ids[-1])
        active = [row for row in rows if row is not None]
        if not active:
            return
        ids_B1 = torch.tensor([[0 if row is None else row.next_id] for row in rows], device=dual.device)
        logits_BV = dual.run(ar_step(ids_B1, cache.lengths), cache)[:, 0]
        for i, token_id in enumerate(_choose(logits_BV, rows, generator)):
            row = rows[i]
            if row is None:
                continue
            cache.lengths[i] += 1
            row.token_ids.append(token_id)
            row.next_id = token_id
            finished = token_id in eos_token_ids
            if finished or len(row.token_ids) == max_new_tokens:
                yield Answer(row.request.key, row.token_ids, finished)
                rows[i] = None
                cache.lengths[i] = 0


def _admit(dual: DualView, cache: SlotCache, requests: list[tuple[int, Request]]) -> None:
    """Feed all but the last prompt token of each request into its row of the cache, together; the last one is
    the first step's. What fills shorter prompts up lies in scratch, where the first steps overwrite it."""
    heads = [request.prompt_ids[:-1] for _, request in requests]
    for (row, _), head in zip(requests, heads, strict=True):
        cache.lengths[row] = len(head)
    longest = max(map(len, heads), default=0)
    if not longest:
        return
    ids_AT = torch.tensor([head + [0] * (longest - len(head)) for head in heads], device=dual.device)
    part = dual.new_cache(longest, len(heads))
    dual.run(prefill(ids_AT, part.lengths, last=False), part)
    rows_A = torch.tensor([row for row, _ in requests], device=dual.device)
    for whole, new in zip((*cache.keys, *cache.values), (*part.keys, *part.values), strict=True):
        whole[rows_A, :, :longest] = new[:, :, :longest]
    for ledger, new in ((cache.positions_BS, part.positions_BS), (cache.writers_BS, part.writers_BS)):
        ledger[rows_A, :longest] = new[:, :longest]


def _choose(logits_BV: Tensor, rows: list[_Row | None], generator: torch.Generator) -> list[int]:
    """Greedy rows by argmax, sampled rows (which share one setting) by a draw."""
    ids_B = greedy_tokens(logits_BV)
    sampled = [i for i, row in enumerate(rows) if row is not None and not row.request.sampling.greedy]
    if sampled:
        params = next(row.request.sampling for row in rows if row and not row.request.sampling.greedy)
        probs_RV = filtered_probs(logits_BV[sampled], params)
        ids_B[sampled] = draw_from_generator(probs_RV, generator)
    return [int(i) for i in ids_B.tolist()]
