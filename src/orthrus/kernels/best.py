"""The best tokens of rows of scores, by our own kernel if it is loaded; `best.cpp` explains it."""

import torch
from torch import Tensor

from orthrus.decoding.sampling import greedy_tokens
from orthrus.kernels.build import kernels_loaded


def best_tokens(scores_RV: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `num` best of each row, best first, their ids (R, num), and log-sum-exp of all, (R, 1); float32."""
    if scores_RV.device.type == "cpu" and kernels_loaded():
        values_RN, ids_RN, totals_R1 = torch.ops.orthrus.best_tokens(scores_RV, num)
        return values_RN, ids_RN, totals_R1
    top = scores_RV.topk(num, dim=-1)
    return top.values, top.indices, scores_RV.logsumexp(-1, keepdim=True)


def first_best(logits_RV: Tensor) -> Tensor:
    """Like `greedy_tokens`: the most probable token of each row, token_ids_R. For equal scores it takes the lowest
    id. It never chooses a NaN; PyTorch would choose the first NaN.
    """
    known = logits_RV.dtype in (torch.float32, torch.bfloat16)
    if logits_RV.device.type == "cpu" and known and kernels_loaded():
        ids_R: Tensor = torch.ops.orthrus.first_best(logits_RV)
        return ids_R
    return greedy_tokens(logits_RV)
