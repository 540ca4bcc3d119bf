"""Runs one pass for many requests, and applies its results: choices, commits, proposals."""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.decoding.cost_table import joint_guesses
from orthrus.decoding.logprobs import token_logprobs
from orthrus.engine.choices import Guessed, Judged, choose, rank
from orthrus.engine.request import Request, Work
from orthrus.engine.work import settle, settle_draft
from orthrus.errors import OrthrusError
from orthrus.model.passes import Pass, Span, join
from orthrus.model.pool import SlotPool
from orthrus.model.runner import Runner

Observer = Callable[[Pass, SlotPool, Tensor], None]
"""Called after every pass, before its tokens are committed, with the pass, the pool and hidden_RC of its rows."""
Chosen = Sequence[tuple[Request, Work]]


class Took(NamedTuple):
    """The cost of a pass until its tokens were chosen: milliseconds, and draft rows projected with the AR rows."""

    ms: float
    num_guesses: int


class _Wish(NamedTuple):
    """A request that gets its next proposal from a block of the pass: the block, and its first guess that is left."""

    request: Request
    work: Work
    span: Span
    block: int
    first: int


def run_round(
    runner: Runner, pool: SlotPool, chosen: Chosen, observers: Sequence[Observer]
) -> tuple[Pass, Took]:
    """Run one pass, commit the tokens that it decides, and make the next proposals from its blocks."""
    start = perf_counter()
    p = join([(work.part, request.slots) for request, work in chosen], runner.dual.device)
    hidden_RC = runner.hidden(p, pool)
    judged_rows, judged = _judged(chosen, p)
    sure = _sure_guesses(runner, chosen, p)
    guess_rows = [row for rows in sure.values() for row in rows]
    own_ids: dict[int, list[int]] = {}
    if judged_rows or guess_rows:
        logits_RV = runner.head(hidden_RC[[*judged_rows, *guess_rows]])
        chosen_ids = choose(logits_RV[: len(judged_rows)], judged)
        own_ids = {id(j.request): ids for j, ids in zip(judged, chosen_ids, strict=True)}
    took = Took((perf_counter() - start) * 1e3, len(guess_rows))
    for observe in observers:
        observe(p, pool, hidden_RC)

    logprobs = {
        id(j.request): token_logprobs(
            logits_RV[j.rows], [max(0, i) for i in own_ids[id(j.request)]], j.request.config.logprobs
        )
        for j in judged
        if j.request.config.logprobs is not None
    }
    wishes = []
    for (request, work), span in zip(chosen, p.spans, strict=True):
        if request.failure is not None:
            continue
        key = id(request)
        try:
            serving = settle(request, work, own_ids.get(key, []), logprobs.get(key, []))
        except OrthrusError as error:
            # A grammar that allows no token ends its own request only.
            request.failure = error
            continue
        if serving is not None:
            wishes.append(_Wish(request, work, span, *serving))
    if wishes:
        places, at = {}, len(judged_rows)
        for key, rows in sure.items():
            places[key], at = at, at + len(rows)
        _draft(runner, hidden_RC, logits_RV if places else None, places, wishes)
    return p, took


def _judged(chosen: Chosen, p: Pass) -> tuple[list[int], list[Judged]]:
    """Rows of the pass whose next token the AR view decides, and the same rows by request."""
    rows: list[int] = []
    judged = []
    for (request, work), span in zip(chosen, p.spans, strict=True):
        part = work.part
        if len(part.judged):
            mine = slice(len(rows), len(rows) + len(part.judged))
            rows += [span.ar_first + row for row in part.judged]
            positions = [span.length + part.offsets[row] + 1 for row in part.judged]
            paths = work.tree.paths_of_tokens() if work.tree.num_nodes else [[] for _ in part.judged]
            judged.append(Judged(request, mine, positions, paths, work.masks_QV))
    return rows, judged


def _sure_guesses(runner: Runner, chosen: Chosen, p: Pass) -> dict[int, list[int]]:
    """Rows of the pass, by request, whose guesses are projected with the AR rows.

    If they are few, these are all guesses, because that costs less than reading the head's weights a second time. If
    they are many, these are the guesses of draft passes, which are needed whichever drafts are accepted. All others
    wait until it is known which block is used.
    """
    if runner.dual.draft_head is not None:
        return {}
    every = sum(len(work.block_rows) * work.num_guesses for _, work in chosen)
    few = joint_guesses(every, own_head=False) > 0
    return {
        id(request): [
            _row(span, row) for block in range(len(work.block_rows)) for row in work.guess_rows(block)
        ]
        for (request, work), span in zip(chosen, p.spans, strict=True)
        if work.block_rows and (few or not work.tree.num_nodes)
    }


def _draft(
    runner: Runner, hidden_RC: Tensor, logits_RV: Tensor | None, places: dict[int, int], wishes: list[_Wish]
) -> None:
    """Make the proposals of all wishes.

    places: by request, the row of logits_RV at which the logits of its guesses begin, if they were projected.
    """
    rows: list[int] = []
    ready: list[int] = []
    guessed = []
    # Requests whose guesses have been projected come first, so that two slices hold all guesses.
    wishes = sorted(wishes, key=lambda w: id(w.request) not in places)
    for w in wishes:
        mine = [_row(w.span, row) for row in w.work.guess_rows(w.block, w.first)]
        guessed.append(
            Guessed(w.request, slice(len(rows), len(rows) + len(mine)), w.request.slots.length + 1)
        )
        rows += mine
        if id(w.request) in places:
            start = places[id(w.request)] + w.block * w.work.num_guesses + w.first
            ready += range(start, start + len(mine))
    hidden_DC = hidden_RC[rows]
    parts = []
    if ready and logits_RV is not None:
        in_a_row = ready == list(range(ready[0], ready[0] + len(ready)))
        parts.append(logits_RV[ready[0] : ready[0] + len(ready)] if in_a_row else logits_RV[ready])
    if len(ready) < len(rows):
        parts.append(runner.head(hidden_DC[len(ready) :], drafts=True))
    logits_DV = parts[0] if len(parts) == 1 else torch.cat(parts)
    for w, candidates in zip(wishes, rank(runner, hidden_DC, logits_DV, guessed), strict=True):
        settle_draft(w.request, candidates, w.first)


def _row(span: Span, row: int) -> int:
    """The row of the pass that is this diffusion row of a part."""
    return span.draft_first + row - span.part.num_ar
