"""Which drafts stand. Both rules return device tensors, so that a cycle needs one host copy."""

from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.decoding.sampling import draw


class Verdict(NamedTuple):
    """`num_accepted` () int64; `next_token` () int64: the AR view's own token after the accepted prefix."""

    num_accepted: Tensor
    next_token: Tensor


def accepted_prefix(match_K: Tensor) -> Tensor:
    """Length of the leading run of True; match_K bool -> () int64."""
    return match_K.long().cumprod(-1).sum(-1)


def verify_greedy(draft_ids_K: Tensor, ar_ids_R: Tensor) -> Verdict:
    """Keep drafts while they equal the AR view's argmax.

    draft_ids_K: K drafts; ar_ids_R: K+1 argmax ids, row i following draft i-1 (row 0 the anchor).
    The row after the accepted prefix gives the correction, or the bonus token when all drafts stand.
    """
    num_accepted = accepted_prefix(draft_ids_K == ar_ids_R[:-1])
    return Verdict(num_accepted, _at(ar_ids_R, num_accepted))


def verify_rejection(
    draft_ids_K: Tensor, draft_probs_KV: Tensor, ar_probs_RV: Tensor, generator: torch.Generator | None
) -> Verdict:
    """Speculative rejection (arXiv 2211.17192, algorithm 1): exact for drafts drawn from draft_probs.

    draft_ids_K: drafts, draft i drawn from draft_probs_KV[i]; ar_probs_RV: K+1 rows, both float32 and
    through the same filter. Draft x stands when u < p(x) / q(x); at the first that falls the next token
    comes from the residual max(p - q, 0), after the last from p.
    """
    num_drafts, vocab_size = draft_probs_KV.shape
    ids_K1 = draft_ids_K[:, None]
    p_K = ar_probs_RV[:num_drafts].gather(1, ids_K1)[:, 0]
    q_K = draft_probs_KV.gather(1, ids_K1)[:, 0]
    u_K = torch.rand(num_drafts, device=q_K.device, generator=generator)
    num_accepted = accepted_prefix(u_K * q_K < p_K)
    # A row of zeros below the drafts turns "after the last" into the same residual formula.
    q_pad_RV = torch.cat([draft_probs_KV, draft_probs_KV.new_zeros(1, vocab_size)])
    p_V = _at(ar_probs_RV, num_accepted)
    residual_V = (p_V - _at(q_pad_RV, num_accepted)).clamp_min(0.0)
    # p == q leaves no residual; the draft then fell only to rounding, and p itself is the law.
    residual_V = torch.where(residual_V.sum() > 0, residual_V, p_V)
    return Verdict(num_accepted, draw(residual_V, generator))


def _at(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]`; plain indexing with a () tensor would copy it to the host first."""
    return rows.index_select(0, index[None])[0]
