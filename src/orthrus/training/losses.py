"""Losses of a draft row against the AR view's row, computed a few vocabulary rows at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthrus.training.loss_kinds import LossKind, WeightKind

Head = Callable[[Tensor], Tensor]

# Rows whose logits exist at the same time. An accelerator reads the head once for each chunk, so its chunks are larger.
_CPU_CHUNK, CHUNK = 128, 512
# Rows that are compared at a time on a CPU. If they fit into its cache, it takes half the time.
_CPU_SLICE = 16


class RowLosses(NamedTuple):
    """Values of each draft row, float32.

    loss_R: the loss, with gradients. overlap_R: sum min(p, q), the acceptance probability of a sampled draft. hit_R: 1
    if draft and AR view agree on the most probable token.
    """

    loss_R: Tensor
    overlap_R: Tensor
    hit_R: Tensor


def pointwise_loss(kind: LossKind, log_q_RV: Tensor, log_p_RV: Tensor, corpus_ids_R: Tensor) -> Tensor:
    """Loss of each row, loss_R. q is the draft's distribution, p the AR view's (both log-probabilities, float32).

    kl: forward KL(p || q), arXiv 2605.12825. ce: cross-entropy on the corpus token. tv: total variation,
    1 - sum min(p, q). lk: a mixture of KL and TV, with more weight on TV as the overlap grows, arXiv 2602.23881.
    """
    if kind == "ce":
        return -log_q_RV.gather(1, corpus_ids_R[:, None])[:, 0]
    p_RV = log_p_RV.exp()
    if kind == "kl":
        return (p_RV * (log_p_RV - log_q_RV)).sum(-1)
    variation_R = 1.0 - torch.minimum(p_RV, log_q_RV.exp()).sum(-1)
    if kind == "tv":
        return variation_R
    kl_weight_R = torch.exp(-3.0 * (1.0 - variation_R.detach()))
    return kl_weight_R * (p_RV * (log_p_RV - log_q_RV)).sum(-1) + (1.0 - kl_weight_R) * variation_R


def row_losses(
    kind: LossKind,
    hidden_RC: Tensor,
    teacher_hidden_TC: Tensor,
    teacher_row_R: Tensor,
    corpus_ids_R: Tensor,
    head: Head,
    *,
    chunk_size: int | None = None,
) -> RowLosses:
    """Losses of draft rows against the teacher rows that are their targets.

    hidden_RC: the draft rows' final hidden states. teacher_row_R: for each, the index of its row in teacher_hidden_TC.
    corpus_ids_R: the corpus tokens there. Rows are sorted by teacher row and processed in chunks. So each teacher row
    is projected once (twice at the border of chunks) although blocks overlap. At most `chunk_size` rows of the
    vocabulary exist at the same time, forward or backward; the default depends on the device.
    """
    if chunk_size is None:
        chunk_size = _CPU_CHUNK if hidden_RC.device.type == "cpu" else CHUNK
    order_R = teacher_row_R.argsort(stable=True)
    loss_R, overlap_R, hit_R = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_RC[order_R],
        kind,
        teacher_hidden_TC,
        teacher_row_R[order_R],
        corpus_ids_R[order_R],
        head,
        chunk_size,
    )
    inverse_R = order_R.argsort()
    return RowLosses(loss_R[inverse_R], overlap_R[inverse_R], hit_R[inverse_R])


def _compare(
    kind: LossKind, logits_RV: Tensor, log_p_RV: Tensor, corpus_ids_R: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss_R, overlap_R, hit_R, gradient of the summed loss with respect to logits_RV), all detached."""
    z_RV = logits_RV.float()
    p_RV = log_p_RV.exp()
    normaliser_R1 = z_RV.logsumexp(-1, keepdim=True)
    # Two maxima and a comparison, because argmax is many times slower on a CPU. Ties count as hits.
    at_best_RV = z_RV.masked_fill(p_RV < p_RV.amax(-1, keepdim=True), -torch.inf)
    hit_R = (at_best_RV.amax(-1) >= z_RV.amax(-1)).float()
    q_RV = (z_RV - normaliser_R1).exp_()
    overlap_R = torch.minimum(p_RV, q_RV).sum(-1)
    if kind == "kl":
        loss_R = torch.linalg.vecdot(p_RV, log_p_RV - z_RV) + normaliser_R1[:, 0]
        grad_RV = q_RV.sub_(p_RV)
    elif kind == "ce":
        ids_R1 = corpus_ids_R[:, None]
        loss_R = (normaliser_R1 - z_RV.gather(1, ids_R1))[:, 0]
        grad_RV = q_RV.scatter_add_(1, ids_R1, torch.full_like(ids_R1, -1.0, dtype=q_RV.dtype))
    else:
        with torch.enable_grad():
            leaf_RV = z_RV.requires_grad_(True)
            loss_R = pointwise_loss(kind, leaf_RV.log_softmax(-1), log_p_RV, corpus_ids_R)
            (grad_RV,) = torch.autograd.grad(loss_R.sum(), leaf_RV)
    return loss_R.detach(), overlap_R, hit_R, grad_RV.to(logits_RV.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Computes losses chunk by chunk, and in the forward pass already the gradients of the hidden states."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RC: Tensor,
        kind: LossKind,
        teacher_hidden_TC: Tensor,
        teacher_row_R: Tensor,
        corpus_ids_R: Tensor,
        head: Head,
        chunk_size: int,
    ) -> tuple[Tensor, ...]:
        parts: list[list[Tensor]] = []
        grads: list[Tensor] = []
        slice_size = _CPU_SLICE if hidden_RC.device.type == "cpu" else chunk_size
        # The host waits for the device here once, and not for every chunk.
        rows_U, where_R = teacher_row_R.unique_consecutive(return_inverse=True)
        num_rows = len(hidden_RC)
        starts = range(0, max(1, num_rows), chunk_size)
        ends = [min(start + chunk_size, num_rows) - 1 for start in starts]
        seen = torch.stack([where_R[::chunk_size], where_R[ends]]).tolist() if num_rows else ([0], [-1])
        for start, first, last in zip(starts, *seen, strict=True):
            chunk = slice(start, start + chunk_size)
            which_R = where_R[chunk] - first
            log_p_TV = head(teacher_hidden_TC[rows_U[first : last + 1]]).float().log_softmax(-1)
            with torch.enable_grad():
                hidden = hidden_RC[chunk].detach().requires_grad_(True)
                logits_RV = head(hidden)
            compared = [
                _compare(kind, z_SV, log_p_TV[which_S], ids_S)
                for z_SV, which_S, ids_S in zip(
                    logits_RV.detach().split(slice_size),
                    which_R.split(slice_size),
                    corpus_ids_R[chunk].split(slice_size),
                    strict=True,
                )
            ]
            *values, grad_RV = (torch.cat(part) for part in zip(*compared, strict=True))
            parts.append(values)
            # Rows are independent, so one backward pass gives the gradient of each row.
            grads += torch.autograd.grad(logits_RV, hidden, grad_RV)
        outputs = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(torch.cat(grads))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss_R: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grads_RC,) = ctx.saved_tensors
        return (grad_loss_R[:, None].to(grads_RC.dtype) * grads_RC, *([None] * 6))


def position_weights(
    kind: WeightKind, overlap_BNJ: Tensor, valid_BNJ: Tensor, *, gamma: float = 4.0, smoothing: float = 0.5
) -> Tensor:
    """Weights of a block's targets, weight_BNJ; zero where invalid. The caller normalises them.

    uniform: arXiv 2605.12825. decay: exp(-j / gamma). dpace: the target's contribution to the expected accepted length,
    sum over m >= j of prod over i <= m of (1 - a) q_i + a, where a is `smoothing`, from arXiv 2605.18810.
    """
    if kind == "uniform":
        weight_BNJ = torch.ones_like(overlap_BNJ)
    elif kind == "decay":
        steps_J = torch.arange(overlap_BNJ.shape[-1], device=overlap_BNJ.device)
        weight_BNJ = torch.exp(-steps_J / gamma).expand_as(overlap_BNJ)
    else:
        prob_BNJ = ((1.0 - smoothing) * overlap_BNJ + smoothing).where(valid_BNJ, 1.0)
        reach_BNJ = prob_BNJ.cumprod(-1) * valid_BNJ
        weight_BNJ = reach_BNJ.flip(-1).cumsum(-1).flip(-1)
    return weight_BNJ * valid_BNJ
