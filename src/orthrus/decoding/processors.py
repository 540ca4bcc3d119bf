"""What changes logits before they become a choice: logit bias and repetition penalty."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from orthrus.config import SamplingParams
from orthrus.errors import UserInputError


class LogitRules:
    """The rules of one request over rows of logits, with what its text has seen so far.

    Bias comes first, then the penalty, in fp32 and with the arithmetic of transformers' own processors. Rows
    of a draft tree differ in what they have seen: the committed tokens (`see`) and each row's own path.

    Raises UserInputError for a biased token id that the vocabulary does not have.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, device: torch.device | str) -> None:
        bias = params.logit_bias or {}
        if beyond := [token_id for token_id in bias if token_id >= vocab_size]:
            raise UserInputError(
                f"logit_bias names token {beyond[0]}, but the model's ids end at {vocab_size - 1}; "
                "use ids of this model's tokenizer."
            )
        self._device = torch.device(device)
        self._bias_ids_I = torch.tensor(list(bias), dtype=torch.long, device=device)
        self._bias_I = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self._penalty = params.repetition_penalty
        self._seen: set[int] = set()
        self._seen_ids_S = torch.empty(0, dtype=torch.long, device=device)

    @property
    def active(self) -> bool:
        """False where calling the rules gives back what it got."""
        return self._penalty != 1.0 or len(self._bias_ids_I) > 0

    def see(self, token_ids: Iterable[int]) -> None:
        """Add committed tokens, those of the prompt included; each counts once, however often it comes."""
        if self._penalty == 1.0:
            return
        if new := set(token_ids) - self._seen:
            self._seen |= new
            self._seen_ids_S = torch.cat([self._seen_ids_S, self._on_device(sorted(new))])

    def __call__(self, logits_RV: Tensor, path_ids: Sequence[Sequence[int]]) -> Tensor:
        """Logits by the rules, float32, in new memory; logits_RV itself where no rule is active.

        path_ids: for each row the tokens that it has seen beyond the committed ones, in any order.
        """
        assert len(path_ids) == len(logits_RV), "one path per row"
        if not self.active:
            return logits_RV
        scores_RV = logits_RV.to(torch.float32, copy=True)
        if len(self._bias_ids_I):
            scores_RV[:, self._bias_ids_I] += self._bias_I
        if self._penalty != 1.0:
            scores_RV[:, self._seen_ids_S] = self._penalised(scores_RV[:, self._seen_ids_S])
            cells = [(row, token) for row, path in enumerate(path_ids) for token in set(path) - self._seen]
            if cells:
                rows_N, ids_N = self._on_device(cells).unbind(-1)
                scores_RV[rows_N, ids_N] = self._penalised(scores_RV[rows_N, ids_N])
        return scores_RV

    def _penalised(self, scores: Tensor) -> Tensor:
        """Lower where the penalty is above 1, whatever the sign (after arXiv 1909.05858, section 4.1)."""
        return torch.where(scores < 0, scores * self._penalty, scores / self._penalty)

    def _on_device(self, numbers: Sequence[object]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)
