"""Whether the text that a server writes is the base's own: the commonest fault of a corpus shows nowhere else."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

NEAR_TIE = 0.1
"""Nats below the most probable token that rounding of another machine may account for."""
LEAST_AGREEMENT = 0.9
"""Share of greedy tokens that the base would have chosen, too."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of greedy answers: their tokens, how many of them the base would have chosen in their place, and the mean
    log probability that it gives them."""

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
    """How far the base agrees with greedy answers, each (prompt ids, answer ids), read as they stand.

    Each token is judged after the tokens that the server wrote before it, so one near-tie that fell the other way
    does not count against what follows. Not while another thread runs the model.
    """
    tokens = agreeing = 0
    total = 0.0
    for prompt_ids, answer_ids in answers:
        ids_1T = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
        # The last row tells what comes after the answer.
        kept = len(answer_ids) + 1
        logits_TV = model(input_ids=ids_1T, use_cache=False, logits_to_keep=kept).logits[0, -kept:-1]
        log_p_TV = logits_TV.float().log_softmax(-1)
        own_T = log_p_TV.gather(1, ids_1T[0, -len(answer_ids) :, None])[:, 0]
        tokens += len(answer_ids)
        agreeing += int((own_T >= log_p_TV.amax(-1) - NEAR_TIE).sum())
        total += float(own_T.sum())
    return Agreement(tokens, agreeing, total / tokens if tokens else 0.0)
