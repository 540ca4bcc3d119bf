"""Turns the logits of a pass into the AR view's choices and into drafts, for all of its requests together."""

from collections.abc import Sequence
from math import isfinite, nan
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.decoding.noise import exponential_noise
from orthrus.decoding.pairs import given_the_prefix
from orthrus.decoding.sampling import coupled_log_scores, draw_with_noise, filtered_probs
from orthrus.decoding.tree import Candidates
from orthrus.engine.request import Request
from orthrus.kernels.best import best_tokens, first_best
from orthrus.kernels.pairs import repaired_pairs
from orthrus.model.runner import Runner

NO_TOKEN = -1
"""In the place of a token that the AR view cannot choose."""


class Judged(NamedTuple):
    """The judged AR rows of one request.

    rows: rows of the logits. positions: of the tokens that they decide. paths: the tokens that each row has seen beyond
    the committed ones. masks_QV: the tokens that a grammar allows after each row.
    """

    request: Request
    rows: slice
    positions: list[int]
    paths: list[list[int]]
    masks_QV: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the choice is simply the largest logit."""
        request = self.request
        return request.config.sampling.greedy and not request.rules.active and self.masks_QV is None


class Guessed(NamedTuple):
    """Draft rows of one request: rows of the hidden states, and the first position that they guess."""

    request: Request
    rows: slice
    first_position: int


def choose(logits_RV: Tensor, judged: Sequence[Judged]) -> list[list[int]]:
    """The AR view's own token after each row, by request. logits_RV: of the rows of all requests.

    The noise of a sampled token is a function of seed and position. So drafts and other requests cannot change the
    text. Where a NaN or infinite logit decides the choice, the token is NO_TOKEN. This is an error only on the accepted
    path, because elsewhere it is after a rejected draft.
    """
    special = [j for j in judged if not j.is_plain]
    unsure: list[tuple[slice, Tensor]] = []
    if len(special) < len(judged):
        ids_R = first_best(logits_RV)
    else:
        ids_R = torch.zeros(len(logits_RV), dtype=torch.long, device=logits_RV.device)
    for j in special:
        ruled_QV = j.request.rules(logits_RV[j.rows], j.paths, j.masks_QV)
        if j.request.config.sampling.greedy:
            ids_R[j.rows] = first_best(ruled_QV)
            continue
        probs_QV = filtered_probs(ruled_QV, j.request.config.sampling)
        ids_Q = draw_with_noise(probs_QV, _noise(j.request, j.positions, probs_QV))
        ids_R[j.rows] = ids_Q
        # One NaN or infinite logit makes all probabilities of its row NaN.
        unsure.append((j.rows, ~probs_QV.gather(-1, ids_Q[:, None])[:, 0].isfinite()))
    # One copy from the device for both. A double holds every id.
    logits_R = logits_RV.gather(-1, ids_R[:, None])[:, 0]
    for rows, unsure_Q in unsure:
        logits_R[rows].masked_fill_(unsure_Q, nan)
    ids, logits = torch.stack([ids_R.double(), logits_R.double()]).tolist()
    found = [int(i) if isfinite(logit) else NO_TOKEN for i, logit in zip(ids, logits, strict=True)]
    return [found[j.rows] for j in judged]


def rank(
    runner: Runner, hidden_DC: Tensor, logits_DV: Tensor, guessed: Sequence[Guessed]
) -> list[Candidates]:
    """The best candidates of each draft row, by request. A request's first row follows its anchor.

    hidden_DC, logits_DV: of the draft rows of all requests, before and after the head. With a repair head, the first
    row depends on the anchor, and each further candidate on the one before it: see `Candidates.pairs_DPC`.
    """
    dual = runner.dual
    width = min(8 if dual.repair is None else 16, logits_DV.shape[-1])
    found: list[Candidates | None] = [None] * len(guessed)
    for temperature in dict.fromkeys(_temperature(g) for g in guessed):
        mine = [i for i, g in enumerate(guessed) if _temperature(g) == temperature]
        scores = [_scores(guessed[i], logits_DV[guessed[i].rows]) for i in mine]
        sizes = [len(some_DV) for some_DV in scores]
        scores_DV = scores[0] if len(mine) == 1 else torch.cat(scores)
        best_DC, ids_DC, all_D1 = best_tokens(scores_DV, width)
        alone_DC = best_DC - all_D1
        log_probs_DC, pairs_DPC = given_the_prefix(alone_DC), None
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        if dual.repair is None:
            log_probs_DC[firsts] = alone_DC[firsts]
        else:
            parents_DP = ids_DC.roll(1, 0)
            anchors = [guessed[i].request.anchor_id for i in mine]
            parents_DP[firsts] = torch.tensor(anchors, device=parents_DP.device)[:, None]
            rows_DC = torch.cat([hidden_DC[guessed[i].rows] for i in mine])
            given_DPC = repaired_pairs(
                dual, runner.repair_tables, rows_DC, parents_DP, ids_DC, best_DC, all_D1, temperature
            )
            log_probs_DC[firsts] = given_DPC[firsts, 0]
            pairs_DPC = given_the_prefix(given_DPC)
        ids, log_probs = ids_DC.tolist(), log_probs_DC.tolist()
        pairs = None if pairs_DPC is None else pairs_DPC.tolist()
        for i, first, size in zip(mine, firsts, sizes, strict=True):
            rows = slice(first, first + size)
            mine_pairs = None if pairs is None else [[], *pairs[first + 1 : first + size]]
            found[i] = Candidates(ids[rows], log_probs[rows], mine_pairs)
    return [candidates for candidates in found if candidates is not None]


def _temperature(guessed: Guessed) -> float:
    sampling = guessed.request.config.sampling
    return 1.0 if sampling.greedy else sampling.temperature


def _scores(guessed: Guessed, logits_DV: Tensor) -> Tensor:
    """Unnormalised log probs, scores_DV float32, by which draft rows rank their guesses.

    Sampled drafts rank with the noise of the AR view's own coming choice. Where both distributions agree, the tokens
    agree too (arXiv 2408.07978).
    """
    request = guessed.request
    logits_DV = request.rules(logits_DV, [()] * len(logits_DV))
    if request.config.sampling.greedy:
        return logits_DV.float()
    probs_DV = filtered_probs(logits_DV, request.config.sampling)
    positions = range(guessed.first_position, guessed.first_position + len(probs_DV))
    return coupled_log_scores(probs_DV, _noise(request, positions, probs_DV))


def _noise(request: Request, positions: Sequence[int], probs_RV: Tensor) -> list[Tensor]:
    """The rows of noise. They are kept until the text has passed them, because drafting and verifying need the same."""
    new = [p for p in dict.fromkeys(positions) if p not in request.noise]
    if new:
        length = request.slots.length
        request.noise = {p: row for p, row in request.noise.items() if p >= length}
        rows = exponential_noise(request.seed, new, probs_RV.shape[-1], probs_RV.device)
        request.noise |= zip(new, rows, strict=True)
    return [request.noise[p] for p in positions]
