"""Log probs of chosen tokens and of the most probable ones, by the model's own distribution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orthrus.types import TokenLogprob

LEAST_LOGPROB = -9999.0
"""What stands for a log prob of minus infinity, or of no number, which JSON does not have."""


def token_logprobs(logits_RV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Of each row the log prob of its chosen token, and the `num_top` most probable tokens with theirs.

    logits_RV: as the model gives them, before bias, penalties, grammar and temperature, any float dtype; the
    softmax is float32. A row's values depend on that row alone. The top comes most probable first, ties by
    the lowest id; it has fewer tokens where the vocabulary has fewer, and may hold the chosen one.
    """
    assert len(token_ids) == len(logits_RV), "one chosen token per row"
    if not token_ids:
        return []
    # Without numbers that are none, and without infinities, whose difference is none.
    logits_RV = torch.nan_to_num(logits_RV.float(), nan=-torch.inf, neginf=-torch.inf)
    log_probs_RV = torch.nan_to_num(logits_RV.log_softmax(-1), nan=LEAST_LOGPROB, neginf=LEAST_LOGPROB)
    log_probs_RV.clamp_min_(LEAST_LOGPROB)
    chosen_R = log_probs_RV.gather(-1, torch.tensor(token_ids, device=logits_RV.device)[:, None])[:, 0]
    tops = _tops(log_probs_RV, min(num_top, logits_RV.shape[-1]))
    rows = zip(token_ids, chosen_R.tolist(), tops, strict=True)
    return [TokenLogprob(token_id, log_prob, top) for token_id, log_prob, top in rows]


def _tops(log_probs_RV: Tensor, num_top: int) -> list[tuple[tuple[int, float], ...]]:
    if num_top < 1:
        return [()] * len(log_probs_RV)
    least_R1 = log_probs_RV.topk(num_top, dim=-1).values[:, -1:]
    # topk leaves open which of several equal tokens it takes: take them all, then sort.
    tops: list[list[tuple[float, int]]] = [[] for _ in log_probs_RV]
    rows_N, ids_N = (log_probs_RV >= least_R1).nonzero(as_tuple=True)
    values_N = log_probs_RV[rows_N, ids_N]
    for row, token_id, value in zip(rows_N.tolist(), ids_N.tolist(), values_N.tolist(), strict=True):
        tops[row].append((-value, token_id))
    return [tuple((token_id, -cost) for cost, token_id in sorted(top)[:num_top]) for top in tops]
