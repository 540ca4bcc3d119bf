"""Probabilities that an audit states: tails of chi-square distributions, bounds on rates, corrections, intervals.

scipy has all of them, but only the tests may need it; float64 throughout.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CONFIDENCE = 0.95
NUM_BOOTSTRAPS = 10_000
_BISECTIONS = 80


def chi2_tail(statistic: float, degrees: float) -> float:
    """P(X >= statistic) for a chi-square distribution with so many degrees of freedom."""
    if statistic <= 0.0:
        return 1.0
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def chi2_threshold(significance: float, degrees: float) -> float:
    """The statistic that a chi-square variable exceeds with this probability."""
    most = degrees + 20 * math.sqrt(2 * degrees) + 200
    return bisect(lambda x: chi2_tail(x, degrees) < significance, 0.0, most)


def noncentral_tail(statistic: float, degrees: float, noncentrality: float) -> float:
    """P(X >= statistic) for the noncentral chi-square distribution: a mixture with Poisson weights."""
    mean = noncentrality / 2
    if mean <= 0.0:
        return chi2_tail(statistic, degrees)
    spread = 12 * math.sqrt(mean) + 30
    j_J = torch.arange(max(0, int(mean - spread)), int(mean + spread), dtype=torch.float64)
    weights_J = (j_J * math.log(mean) - mean - torch.lgamma(j_J + 1)).exp()
    tails_J = torch.special.gammaincc(degrees / 2 + j_J, torch.full_like(j_J, statistic / 2))
    return float((weights_J * tails_J).sum())


def chi2_power(significance: float, degrees: float, noncentrality: float) -> float:
    """How often a chi-square test of this significance finds a deviation of this noncentrality."""
    return noncentral_tail(chi2_threshold(significance, degrees), degrees, noncentrality)


def largest_rate(num_found: int, num_runs: int, confidence: float = CONFIDENCE) -> float:
    """The upper Clopper-Pearson bound: the rate at which so few findings have probability 1 - confidence.

    With no finding in n runs it is 1 - (1 - confidence)^(1/n), close to the rule of three, 3/n.
    """
    if num_found >= num_runs:
        return 1.0
    if num_found == 0:
        return -math.expm1(math.log1p(-confidence) / num_runs)
    k_K = torch.arange(num_found + 1, dtype=torch.float64)
    n = torch.tensor(float(num_runs), dtype=torch.float64)
    log_ways_K = torch.lgamma(n + 1) - torch.lgamma(k_K + 1) - torch.lgamma(n - k_K + 1)

    def too_large(rate: float) -> bool:
        log_K = log_ways_K + k_K * math.log(rate) + (n - k_K) * math.log1p(-rate)
        return float(log_K.exp().sum()) < 1 - confidence

    return bisect(too_large, num_found / num_runs, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order. Each may be compared with the significance of the whole family."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def ratio_interval(ours_N: Sequence[float], theirs_N: Sequence[float]) -> tuple[float, float, float, float]:
    """(sum ours / sum theirs, low, high, standard error), where entry n of both belongs to prompt n.

    low, high: the 2.5 % and 97.5 % quantiles of the ratio over bootstrap draws of the prompts, with seed 0.
    standard error: the standard deviation over these draws.
    """
    pairs_2N = torch.tensor([list(ours_N), list(theirs_N)], dtype=torch.float64)
    num = pairs_2N.shape[1]
    generator = torch.Generator().manual_seed(0)
    drawn_BN = torch.randint(num, (NUM_BOOTSTRAPS, num), generator=generator)
    sums_2B = pairs_2N[:, drawn_BN].sum(-1)
    ratios_B = sums_2B[0] / sums_2B[1].clamp_min(1e-12)
    edge = (1 - CONFIDENCE) / 2
    low, high = ratios_B.quantile(torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return float(pairs_2N[0].sum() / pairs_2N[1].sum().clamp_min(1e-12)), low, high, float(ratios_B.std())


def bisect(is_above: Callable[[float], bool], low: float, high: float) -> float:
    """The point between low and high where `is_above` turns from False to True; high if it stays False."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return high


def as_row(values: Sequence[float]) -> Tensor:
    """Values_N in float64."""
    return torch.tensor(list(values), dtype=torch.float64)
