"""Chooses tokens from logits. Both views use the same filters, always in float32."""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from orthrus.config import SamplingParams

_CHUNK, _LEAST_CHUNK = 256, 16


def filtered_probs(logits_RV: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities after temperature, top-k, top-p and min-p, in that order (as in transformers).

    logits_RV: any float dtype. Returns probs_RV float32, whose rows sum to 1. For greedy decoding call `greedy_tokens`
    instead.
    """
    assert not params.greedy, "greedy decoding never meets a probability"
    logits_RV = logits_RV if params.temperature == 1.0 else logits_RV.float() / params.temperature
    vocab_size = logits_RV.shape[-1]
    if params.top_k and params.top_k < vocab_size:
        kth_R1 = logits_RV.topk(params.top_k, dim=-1).values[..., -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < kth_R1, -torch.inf)
    if params.top_p is not None and params.top_p < 1.0:
        probs_RV = logits_RV.softmax(-1, dtype=torch.float32)
        logits_RV = logits_RV.masked_fill(~nucleus(probs_RV, params.top_p), -torch.inf)
    probs_RV = logits_RV.softmax(-1, dtype=torch.float32)
    if params.min_p:
        least_R1 = params.min_p * probs_RV.amax(-1, keepdim=True)
        kept_RV = logits_RV.masked_fill(probs_RV < least_R1, -torch.inf)
        probs_RV = kept_RV.softmax(-1, dtype=torch.float32)
    return probs_RV


def nucleus(probs_RV: Tensor, top_p: float, num_first: int = 1024) -> Tensor:
    """The tokens that top-p keeps, keep_RV bool: more probable tokens have less than top_p of the mass.

    On a CPU, sorting a vocabulary takes as long as a small model's pass. So the `num_first` most probable tokens are
    tried first, and only rows with a larger nucleus are sorted as a whole.
    """
    if probs_RV.device.type != "cpu" or num_first >= probs_RV.shape[-1]:
        return _nucleus_of_top(probs_RV, top_p, probs_RV.shape[-1])
    keep_RV = _nucleus_of_top(probs_RV, top_p, num_first)
    cut_R = (probs_RV * keep_RV).sum(-1) < top_p
    if bool(cut_R.any()):
        keep_RV[cut_R] = _nucleus_of_top(probs_RV[cut_R], top_p, probs_RV.shape[-1])
    return keep_RV


def _nucleus_of_top(probs_RV: Tensor, top_p: float, num_first: int) -> Tensor:
    top_RK, ids_RK = probs_RV.topk(num_first, dim=-1)
    above_RK = top_RK.cumsum(-1) - top_RK
    # The most probable token stays even if top_p is 0.
    above_RK[..., 0] = -1.0
    return torch.zeros_like(probs_RV, dtype=torch.bool).scatter(-1, ids_RK, above_RK < top_p)


def greedy_tokens(logits_RV: Tensor) -> Tensor:
    """The most probable token of each row; logits_RV -> token_ids_R. Ties go to the lowest id."""
    return _argmax(logits_RV)


def draw_with_noise(probs_RV: Tensor, noise_RV: Tensor | Sequence[Tensor]) -> Tensor:
    """One token per row by the exponential race; probs_RV float32 -> token_ids_R.

    noise_RV: float32, as one tensor or as a list of rows, some of which may be the same.

    argmax(p / e) with e ~ Exp(1) has distribution p and never gives a token of probability 0. Unlike multinomial it
    needs no host synchronisation. Rows need not be normalised. With `noise.exponential_noise` the token is a function
    of seed, position and p only, whichever pass p came from.
    """
    return _argmax(_raced(probs_RV, noise_RV))


def _raced(probs_RV: Tensor, noise_RV: Tensor | Sequence[Tensor]) -> Tensor:
    """p / e. On a CPU it reads the rows of noise in place, because stacking them costs more."""
    if isinstance(noise_RV, Tensor):
        return probs_RV / noise_RV
    if probs_RV.device.type != "cpu":
        return probs_RV / torch.stack(list(noise_RV))
    scores_RV = torch.empty_like(probs_RV)
    for score_V, prob_V, noise_V in zip(scores_RV, probs_RV, noise_RV, strict=True):
        torch.div(prob_V, noise_V, out=score_V)
    return scores_RV


def _argmax(scores_RV: Tensor) -> Tensor:
    """The first of the largest scores of each row, token_ids_R.

    On a CPU PyTorch's argmax looks at one number at a time. The maxima of chunks are vectorised, and leave few
    numbers to look at.
    """
    size = gcd(scores_RV.shape[-1], _CHUNK)
    if scores_RV.device.type != "cpu" or size < _LEAST_CHUNK:
        return scores_RV.argmax(-1)
    chunks_RNS: Tensor = scores_RV.unflatten(-1, (-1, size))
    best_R1 = chunks_RNS.amax(-1).argmax(-1, keepdim=True)
    best_RS = chunks_RNS.take_along_dim(best_R1[..., None], dim=-2).squeeze(-2)
    return best_R1.squeeze(-1) * size + best_RS.argmax(-1)


def coupled_log_scores(probs_RV: Tensor, noise_RV: Tensor | Sequence[Tensor]) -> Tensor:
    """log p - log e, the value that `draw_with_noise` maximises; minus infinity where p is 0. Drafts rank by it.

    The best score of a row is its draw, and its best C scores are C draws without replacement. If the diffusion view
    is scored with the noise of the AR view's coming draw, the two are coupled. Draws of distributions p and q, at
    total variation distance TV, then agree with probability at least (1 - TV) / (1 + TV) (Gumbel coupling,
    arXiv 2408.07978). Independent draws agree with probability sum(p q). The AR view's draw does not depend on the
    draft, so its distribution stays p.
    """
    return _raced(probs_RV, noise_RV).log()
