"""Log probs of candidates given the ones before them."""

import torch
from torch import Tensor

FORESIGHT = 0.2
"""What the log prob of a guess rises by where those before it stand: a block that was right so far is right
more often than it says of each place by itself. Tried on the shipped view, where more drafts stand so."""


def given_the_prefix(log_probs: Tensor) -> Tensor:
    """Log probs of a block's guesses, any shape, corrected by `FORESIGHT`; no longer normalised."""
    return (log_probs + FORESIGHT).clamp_max(0.0)


def pair_log_probs(scores_DM: Tensor, normaliser_D1: Tensor, changes_DPM: Tensor) -> Tensor:
    """log_probs_DPM, normalised over the whole vocabulary; float32.

    scores_DM: unnormalised log probs of the M candidates of each position; normaliser_D1: logsumexp over all
    tokens of that position. changes_DPM: what each of P parents adds to the candidates' scores; all other
    tokens keep theirs, since nobody has looked at them.
    """
    candidates_D1 = scores_DM.logsumexp(-1, keepdim=True)
    # log(1 - share): -inf where the candidates hold all of the mass, as far as float32 can tell.
    share_D1 = (candidates_D1 - normaliser_D1).clamp_max(0.0)
    rest_D1 = normaliser_D1 + torch.log(-torch.expm1(share_D1))
    given_DPM = scores_DM[:, None] + changes_DPM
    return given_DPM - torch.logaddexp(given_DPM.logsumexp(-1), rest_D1)[..., None]
