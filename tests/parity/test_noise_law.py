"""Draws with noise by position have exactly the given distribution, and couple drafts with choices."""

from functools import cache

import pytest
import torch
from scipy import stats
from tests.parity.test_sampling_law import SIGNIFICANCE, smallest_effect
from torch import Tensor

from orthrus.decoding.noise import exponential_noise
from orthrus.decoding.sampling import coupled_log_scores, draw_with_noise

NUM_DRAWS, EFFECT = 20000, 0.06
PROBS = [0.5, 0.25, 0.0, 0.125, 0.1, 0.02, 0.005]


@cache
def noise_over(what: str, vocab_size: int, num_draws: int = NUM_DRAWS) -> Tensor:
    if what == "positions":
        return exponential_noise(3, range(num_draws), vocab_size, "cpu")
    return torch.cat([exponential_noise(seed, [40], vocab_size, "cpu") for seed in range(num_draws)])


@pytest.mark.parametrize("scale", [1.0, 1e-20])
@pytest.mark.parametrize("what", ["positions", "seeds"])
def test_a_draw_has_the_given_distribution(what: str, scale: float) -> None:
    probs_V = torch.tensor(PROBS)
    probs_RV = (probs_V * scale).expand(NUM_DRAWS, -1)
    ids = draw_with_noise(probs_RV, noise_over(what, len(PROBS)))
    counts = ids.bincount(minlength=len(PROBS))
    keep = probs_V > 0
    assert counts[~keep].sum() == 0
    assert stats.chisquare(counts[keep], NUM_DRAWS * probs_V[keep].double()).pvalue > SIGNIFICANCE
    assert smallest_effect(NUM_DRAWS, int(keep.sum()) - 1) < EFFECT


def test_a_sharp_distribution_over_a_large_vocabulary() -> None:
    """One token with 0.9, 30,000 that share the rest evenly: groups of these come as often as they should."""
    vocab_size, num_draws = 30001, 4000
    probs_V = torch.full((vocab_size,), 0.1 / (vocab_size - 1))
    probs_V[12345] = 0.9
    ids = torch.cat(
        [
            draw_with_noise(
                probs_V.expand(100, -1), exponential_noise(0, range(i, i + 100), vocab_size, "cpu")
            )
            for i in range(0, num_draws, 100)
        ]
    )
    rare = ids[ids != 12345]
    assert stats.binomtest(len(rare), num_draws, 0.1).pvalue > SIGNIFICANCE
    assert stats.kstest(rare.numpy() / vocab_size, "uniform").pvalue > SIGNIFICANCE


def test_biased_noise_fails_the_same_test() -> None:
    """Noise in steps of 1/64, as a careless conversion would give."""
    coarse_RV = noise_over("positions", len(PROBS)).mul(64).ceil().div(64)
    counts = draw_with_noise(torch.tensor(PROBS).expand(NUM_DRAWS, -1), coarse_RV).bincount(
        minlength=len(PROBS)
    )
    keep = torch.tensor(PROBS) > 0
    assert stats.chisquare(counts[keep], NUM_DRAWS * torch.tensor(PROBS)[keep].double()).pvalue < SIGNIFICANCE


def test_a_certain_token_is_drawn_whatever_its_noise() -> None:
    probs_RV = torch.zeros(5000, 40)
    probs_RV[:, 39] = 1.0
    assert (draw_with_noise(probs_RV, noise_over("positions", 40, 5000)) == 39).all()


def test_the_best_score_is_the_draw() -> None:
    probs_RV = torch.randn(2000, 500, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    probs_RV[:, ::3] = 0.0
    noise_RV = noise_over("positions", 500, 2000)
    scores_RV = coupled_log_scores(probs_RV, noise_RV)
    assert torch.equal(scores_RV.argmax(-1), draw_with_noise(probs_RV, noise_RV))
    assert torch.equal(scores_RV == -torch.inf, probs_RV == 0.0)
    torch.testing.assert_close(scores_RV, probs_RV.log() - noise_RV.log(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_two_distributions_under_the_same_noise_agree_as_often_as_the_coupling_says(
    spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(20, generator=generator) * 1.5
    p_V = logits_V.double().softmax(-1)
    q_V = (logits_V + spread * torch.randn(20, generator=generator)).double().softmax(-1)
    noise_RV = exponential_noise(seed, range(NUM_DRAWS), 20, "cpu")
    choice_R, draft_R = (
        draw_with_noise(each_V.float().expand_as(noise_RV), noise_RV) for each_V in (p_V, q_V)
    )
    agreed = int((choice_R == draft_R).sum())

    distance = float((p_V - q_V).abs().sum() / 2)
    bound = (1.0 - distance) / (1.0 + distance)
    # Exponential clocks: both choose i with probability 1 / sum over j of max(p_j / p_i, q_j / q_i).
    both_VV = torch.maximum(p_V[None] / p_V[:, None], q_V[None] / q_V[:, None])
    exact = float((1.0 / both_VV.sum(-1)).sum())
    assert bound <= exact <= 1.0 - distance + 1e-9
    assert stats.binomtest(agreed, NUM_DRAWS, exact).pvalue > SIGNIFICANCE
    assert exact > float((p_V * q_V).sum())


def test_a_coupled_draft_leaves_the_distribution_of_the_choice_alone() -> None:
    """Both have their own distribution, however often they agree."""
    p_V, q_V = (torch.tensor(probs, dtype=torch.float64) for probs in ([0.6, 0.3, 0.1], [0.2, 0.3, 0.5]))
    noise_RV = noise_over("seeds", len(PROBS))[:, :3]
    choice_R = draw_with_noise(p_V.float().expand(NUM_DRAWS, -1), noise_RV)
    draft_R = coupled_log_scores(q_V.float().expand(NUM_DRAWS, -1), noise_RV).argmax(-1)
    assert 0.3 < float((choice_R == draft_R).float().mean()) < 0.7
    assert stats.chisquare(choice_R.bincount(), NUM_DRAWS * p_V).pvalue > SIGNIFICANCE
    assert stats.chisquare(draft_R.bincount(), NUM_DRAWS * q_V).pvalue > SIGNIFICANCE
