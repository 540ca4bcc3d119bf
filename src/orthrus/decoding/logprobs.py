"""Log probs of chosen tokens and of the most probable ones, by the model's own distribution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orthrus.types import TokenLogprob

LEAST_LOGPROB = -9999.0
"""Replaces a log prob of minus infinity, or of NaN, because JSON has neither."""


def token_logprobs(logits_RV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """For each row, the log prob of its chosen token, and the `num_top` most probable tokens with theirs.

    logits_RV: as the model gives them, before bias, penalties, grammar and temperature, in any float dtype. The softmax
    is float32. The values of a row depend only on that row. The top is sorted, most probable first; among equals the
    lowest id comes first. It may hold the chosen token, and has fewer tokens if the vocabulary has fewer.
    """
    assert len(token_ids) == len(logits_RV), "one chosen token per row"
    if not token_ids:
        return []
    # NaN and infinities are replaced, because inf - inf would be NaN.
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
    # topk does not define which of several equal tokens it takes, so take them all and sort.
    tops: list[list[tuple[float, int]]] = [[] for _ in log_probs_RV]
    rows_N, ids_N = (log_probs_RV >= least_R1).nonzero(as_tuple=True)
    values_N = log_probs_RV[rows_N, ids_N]
    for row, token_id, value in zip(rows_N.tolist(), ids_N.tolist(), values_N.tolist(), strict=True):
        tops[row].append((-value, token_id))
    return [tuple((token_id, -cost) for cost, token_id in sorted(top)[:num_top]) for top in tops]
