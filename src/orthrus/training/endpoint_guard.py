"""Checks that a server's text is the base's own. Nothing else shows this most frequent fault of a corpus."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

NEAR_TIE = 0.1
"""Nats by which a token may be less probable than the best one because of another machine's rounding."""
LEAST_AGREEMENT = 0.9
"""The least share of greedy tokens that the base must choose too."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Counts over greedy answers: tokens, tokens that the base chooses too, and the base's mean log probability."""

    tokens: int
    agreeing: int
    mean_log_prob: float

    @property
    def share(self) -> float:
        return self.agreeing / self.tokens if self.tokens else 0.0

    @property
    def holds(self) -> bool:
        return self.share >= LEAST_AGREEMENT


@torch.no_grad()
def agreement(model: PreTrainedModel, answers: Iterable[tuple[list[int], list[int]]]) -> Agreement:
    """How far the base agrees with greedy answers, each (prompt ids, answer ids).

    Each token is judged after the tokens that the server wrote before it, so one near-tie does not affect the tokens
    after it. No other thread may run the model meanwhile.
    """
    tokens = agreeing = 0
    total = 0.0
    for prompt_ids, answer_ids in answers:
        ids_1T = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
        # The last row predicts the token after the answer, so it is not used.
        kept = len(answer_ids) + 1
        logits_TV = model(input_ids=ids_1T, use_cache=False, logits_to_keep=kept).logits[0, -kept:-1]
        log_p_TV = logits_TV.float().log_softmax(-1)
        own_T = log_p_TV.gather(1, ids_1T[0, -len(answer_ids) :, None])[:, 0]
        tokens += len(answer_ids)
        agreeing += int((own_T >= log_p_TV.amax(-1) - NEAR_TIE).sum())
        total += float(own_T.sum())
    return Agreement(tokens, agreeing, total / tokens if tokens else 0.0)
