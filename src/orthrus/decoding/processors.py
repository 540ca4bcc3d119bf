"""Rules that change logits before the choice: bias, penalties, a minimum length, a grammar's mask."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from orthrus.config import SamplingParams
from orthrus.errors import UserInputError


class LogitRules:
    """The rules of one request for rows of logits, with the tokens of its text so far.

    The order is: logit bias, repetition penalty, frequency and presence penalties, no end of text before `min_tokens`
    new tokens, the masks of a grammar. The arithmetic is that of transformers and vLLM, in float32. A row has seen the
    prompt (`see_prompt`), the committed new tokens (`see`) and its own path in the draft tree. The result for a row
    does not depend, to the last bit, on how the text before it is divided into committed tokens and path.

    end_ids: the tokens that end the text, see `stopping.end_ids`. Not for use by two threads at once.
    Raises UserInputError for a biased token id that the vocabulary does not have.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        device: torch.device | str,
        *,
        min_tokens: int = 0,
        end_ids: Iterable[int] = (),
    ) -> None:
        bias = params.logit_bias or {}
        if beyond := [token_id for token_id in bias if token_id >= vocab_size]:
            raise UserInputError(
                f"logit_bias names token {beyond[0]}, but the model's ids end at {vocab_size - 1}; "
                "use ids of this model's tokenizer."
            )
        self._device = torch.device(device)
        self._bias_ids_I = self._on_device(list(bias))
        self._bias_I = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self._repetition = params.repetition_penalty
        self._frequency, self._presence = params.frequency_penalty, params.presence_penalty
        self._seen: set[int] = set()
        self._seen_ids_S = self._on_device([])
        self._counts: Counter[int] = Counter()
        self._places: dict[int, int] = {}
        # The tokens of the text in order of their first occurrence, and how often each occurs.
        self._text_ids_G, self._counts_G = self._on_device([]), torch.empty(0, device=device)
        self._min_tokens, self._num_new = min_tokens, 0
        self._end_ids_E = self._on_device(sorted(t for t in set(end_ids) if t < vocab_size))

    @property
    def active(self) -> bool:
        """False if the rules without masks change no logits, now and later."""
        return self._penalises or len(self._bias_ids_I) > 0 or self._holds_back

    @property
    def _penalises(self) -> bool:
        return self._repetition != 1.0 or self._counts_tokens

    @property
    def _counts_tokens(self) -> bool:
        return self._frequency != 0.0 or self._presence != 0.0

    @property
    def _holds_back(self) -> bool:
        return self._num_new < self._min_tokens and len(self._end_ids_E) > 0

    def see_prompt(self, token_ids: Iterable[int]) -> None:
        """Add tokens of the prompt, which only the repetition penalty uses."""
        if self._repetition == 1.0:
            return
        if new := set(token_ids) - self._seen:
            self._seen |= new
            self._seen_ids_S = torch.cat([self._seen_ids_S, self._on_device(sorted(new))])

    def see(self, token_ids: Sequence[int]) -> None:
        """Add committed new tokens."""
        self._num_new += len(token_ids)
        self.see_prompt(token_ids)
        if not self._counts_tokens or not token_ids:
            return
        self._counts.update(token_ids)
        if new := [token_id for token_id in dict.fromkeys(token_ids) if token_id not in self._places]:
            self._places |= {token_id: len(self._places) + i for i, token_id in enumerate(new)}
            self._text_ids_G = torch.cat([self._text_ids_G, self._on_device(new)])
            self._counts_G = torch.cat([self._counts_G, self._counts_G.new_zeros(len(new))])
        places = self._on_device([self._places[token_id] for token_id in token_ids])
        self._counts_G.index_add_(0, places, self._counts_G.new_ones(len(token_ids)))

    def __call__(
        self, logits_RV: Tensor, path_ids: Sequence[Sequence[int]], masks_RV: Tensor | None = None
    ) -> Tensor:
        """Logits after the rules, float32, in new memory; logits_RV itself if no rule is active.

        path_ids: for each row, the tokens that it has seen beyond the committed ones, in any order. masks_RV, bool: the
        tokens that the grammar allows after each row, at least one. Where the grammar allows only tokens that end the
        text, the text may end however short it is.
        """
        assert len(path_ids) == len(logits_RV), "one path per row"
        if masks_RV is None and not self.active:
            return logits_RV
        scores_RV = logits_RV.to(torch.float32, copy=True)
        if len(self._bias_ids_I):
            scores_RV[:, self._bias_ids_I] += self._bias_I
        if self._repetition != 1.0:
            scores_RV[:, self._seen_ids_S] = self._repeated(scores_RV[:, self._seen_ids_S])
            cells = [(row, token) for row, path in enumerate(path_ids) for token in set(path) - self._seen]
            if cells:
                rows_N, ids_N = self._on_device(cells).unbind(-1)
                scores_RV[rows_N, ids_N] = self._repeated(scores_RV[rows_N, ids_N])
        if self._counts_tokens:
            self._count(scores_RV, path_ids)
        if masks_RV is not None:
            masks_RV = masks_RV.to(scores_RV.device)
        if self._holds_back:
            self._hold_back(scores_RV, path_ids, masks_RV)
        return scores_RV if masks_RV is None else scores_RV.masked_fill_(~masks_RV, -torch.inf)

    def _repeated(self, scores: Tensor) -> Tensor:
        """Scores with the repetition penalty. Above 1 it lowers all scores (after arXiv 1909.05858, section 4.1)."""
        return torch.where(scores < 0, scores * self._repetition, scores / self._repetition)

    def _count(self, scores_RV: Tensor, path_ids: Sequence[Sequence[int]]) -> None:
        """Apply frequency and presence penalties in place. The count of a token includes the row's path."""
        cells = [
            (row, token, self._counts[token] + count)
            for row, path in enumerate(path_ids)
            for token, count in Counter(path).items()
        ]
        rows_N, ids_N, counts_N = self._on_device(cells).reshape(-1, 3).unbind(-1)
        counted_N = self._counted(scores_RV[rows_N, ids_N], counts_N.float())
        scores_RV[:, self._text_ids_G] = self._counted(scores_RV[:, self._text_ids_G], self._counts_G)
        scores_RV[rows_N, ids_N] = counted_N

    def _counted(self, scores: Tensor, counts: Tensor) -> Tensor:
        return scores - self._frequency * counts - self._presence

    def _hold_back(
        self, scores_RV: Tensor, path_ids: Sequence[Sequence[int]], masks_RV: Tensor | None
    ) -> None:
        """Forbid, in place, the end of the text in rows whose text is too short."""
        early_R = torch.tensor([self._num_new + len(path) < self._min_tokens for path in path_ids])
        early_R = early_R.to(scores_RV.device)
        if masks_RV is not None:
            others_RV = masks_RV.clone()
            others_RV[:, self._end_ids_E] = False
            early_R &= others_RV.any(-1)
        ends_RE = scores_RV[:, self._end_ids_E]
        scores_RV[:, self._end_ids_E] = ends_RE.masked_fill_(early_R[:, None], -torch.inf)

    def _on_device(self, numbers: Sequence[object]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)
