"""Log probs of candidates, given the candidates before them."""

import torch
from torch import Tensor

FORESIGHT = 0.2
"""Added to the log prob of a guess, given that those before it are accepted. Once its first guesses are accepted, a
block is right more often than its own probabilities say. In trials with the shipped view, more drafts were accepted."""


def given_the_prefix(log_probs: Tensor) -> Tensor:
    """Log probs of a block's guesses, of any shape, plus `FORESIGHT`, at most 0. They are no longer normalised."""
    return (log_probs + FORESIGHT).clamp_max(0.0)


def pair_log_probs(scores_DM: Tensor, normaliser_D1: Tensor, changes_DPM: Tensor) -> Tensor:
    """log_probs_DPM, normalised over the whole vocabulary; float32.

    scores_DM: unnormalised log probs of the M candidates of each position. normaliser_D1: logsumexp over all tokens of
    that position. changes_DPM: the term that each of P parents adds to the candidates' scores. All other tokens keep
    their scores.
    """
    candidates_D1 = scores_DM.logsumexp(-1, keepdim=True)
    # log(1 - share), which is -inf where the candidates hold all of the mass in float32.
    share_D1 = (candidates_D1 - normaliser_D1).clamp_max(0.0)
    rest_D1 = normaliser_D1 + torch.log(-torch.expm1(share_D1))
    given_DPM = scores_DM[:, None] + changes_DPM
    return given_DPM - torch.logaddexp(given_DPM.logsumexp(-1), rest_D1)[..., None]
