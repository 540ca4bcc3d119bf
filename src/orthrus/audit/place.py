"""The position where two outputs differ: how logits become a choice there, and how rounding may change it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orthrus.api import Orthrus
from orthrus.config import DecodeConfig, SamplingParams
from orthrus.decoding.noise import exponential_noise
from orthrus.decoding.processors import LogitRules
from orthrus.decoding.sampling import filtered_probs
from orthrus.decoding.stopping import end_ids

_TOGETHER = 64
"""Tokens in one batch; each needs a row of the whole vocabulary."""


def scores(logits_V: Tensor, sampling: SamplingParams, position: int) -> Tensor:
    """The values that the chosen token maximises, scores_V float32.

    They are the logits, or for a sampled text logits / temperature - log(noise). position: the token's position in the
    whole sequence.
    """
    if sampling.greedy:
        return logits_V
    return logits_V / sampling.temperature - _log_noise(sampling, position, logits_V)


class Place:
    """The choice of the next token after `prompt_ids` and `new_ids`, by the request's settings."""

    def __init__(
        self, orthrus: Orthrus, prompt_ids: Sequence[int], new_ids: Sequence[int], config: DecodeConfig
    ) -> None:
        dual = orthrus.dual
        self.sampling = sampling = config.sampling
        self._position = len(prompt_ids) + len(new_ids)
        ends = end_ids(config, orthrus.base.eos_token_ids, dual.vocab_size)
        self._rules = LogitRules(
            sampling, dual.vocab_size, dual.device, min_tokens=config.min_tokens, end_ids=ends
        )
        self._rules.see_prompt(prompt_ids)
        self._rules.see(new_ids)
        self._mask_1V: Tensor | None = None
        if (grammar := orthrus.grammar_state(config.grammar)) is not None:
            for token_id in new_ids:
                grammar.advance(token_id)
            self._mask_1V = grammar.mask()[None]

    @property
    def has_filters(self) -> bool:
        """Whether top-k, top-p or min-p may remove tokens, whatever their scores are."""
        params = self.sampling
        has_nucleus = params.top_p is not None and params.top_p < 1.0
        return not params.greedy and (bool(params.top_k) or has_nucleus or bool(params.min_p))

    def scores(self, logits_V: Tensor, *, filtered: bool = False) -> Tensor:
        """Scores under the request's rules; minus infinity for what the rules forbid or the filters remove."""
        ruled_1V = self._rules(logits_V[None], [()], self._mask_1V)
        scores_V = scores(ruled_1V[0], self.sampling, self._position)
        if filtered and self.has_filters:
            scores_V = scores_V.masked_fill(filtered_probs(ruled_1V, self.sampling)[0] == 0, -torch.inf)
        return scores_V

    def could_take(self, scores_V: Tensor, token_id: int, margin: float) -> bool:
        """Whether this token may win if each score may be wrong by up to `margin`.

        The filters must be able to keep it, and to remove every token that is better by more than the margin.
        scores_V: without filters.
        """
        better_N = (scores_V > scores_V[token_id] + margin).nonzero()[:, 0]
        return bool(self._keeps(scores_V, better_N.new_tensor([token_id]), margin)[0]) and not any(
            bool(self._keeps(scores_V, some_N, -margin).any()) for some_N in better_N.split(_TOGETHER)
        )

    def _keeps(self, scores_V: Tensor, ids_N: Tensor, change: float) -> Tensor:
        """Whether the filters keep each of these tokens if only its own score changes by `change`; kept_N."""
        rows_NV = (scores_V + _log_noise(self.sampling, self._position, scores_V)).repeat(len(ids_N), 1)
        at_N1 = ids_N[:, None]
        rows_NV.scatter_add_(1, at_N1, torch.full_like(rows_NV[:, :1], change))
        probs_NV = filtered_probs(rows_NV * self.sampling.temperature, self.sampling)
        return probs_NV.gather(1, at_N1)[:, 0] > 0


def _log_noise(sampling: SamplingParams, position: int, like_V: Tensor) -> Tensor:
    assert sampling.seed is not None, "without a seed nothing can be decoded again"
    return exponential_noise(sampling.seed, [position], like_V.shape[-1], like_V.device)[0].log()
