"""The best tokens of draft rows, by a kernel of our own where it has been loaded: `best.cpp` says how."""

import torch
from torch import Tensor

from orthrus.engine.kernels.build import kernels_loaded


def best_tokens(scores_RV: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `num` best of each row, best first, their ids (R, num), and log-sum-exp of all, (R, 1); float32."""
    if scores_RV.device.type == "cpu" and kernels_loaded():
        values_RN, ids_RN, totals_R1 = torch.ops.orthrus.best_tokens(scores_RV, num)
        return values_RN, ids_RN, totals_R1
    top = scores_RV.topk(num, dim=-1)
    return top.values, top.indices, scores_RV.logsumexp(-1, keepdim=True)
