"""The distribution of a real model's sampled text, prefix by prefix, and a chi-square test of draws against it.

The baseline's own logits give the probability of every prefix of an answer that is likely enough to be counted. All
other prefixes form one cell. So the test knows the distribution exactly, and estimates nothing from draws.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orthrus.api import Orthrus
from orthrus.audit.chances import as_row, bisect, chi2_power, chi2_tail, chi2_threshold, noncentral_tail
from orthrus.audit.shapes import continuation_logits
from orthrus.config import Baseline, SamplingParams
from orthrus.decoding.sampling import filtered_probs

Prefix = tuple[int, ...]
LEAST_EXPECTED = 5.0
"""The smallest expected count of a cell. Below it the chi-square distribution is a poor approximation."""


@dataclass(frozen=True, slots=True)
class PromptDistribution:
    """The distribution of the answers to one prompt.

    by_depth: for depth 1, 2, ..., the probability of each likely prefix. A text that ended before the depth is a
    prefix of its own. greedy_ids: the likeliest token at each depth, as far as the prefix is known.
    """

    by_depth: tuple[dict[Prefix, float], ...]
    greedy_ids: Prefix


@dataclass(frozen=True, slots=True)
class Found:
    """A chi-square statistic, summed over prompts, with its degrees of freedom."""

    statistic: float
    degrees: int

    @property
    def p_value(self) -> float:
        return chi2_tail(self.statistic, self.degrees) if self.degrees else 1.0


@torch.inference_mode()
def prompt_distribution(
    orthrus: Orthrus,
    against: Baseline,
    prompt_ids: list[int],
    sampling: SamplingParams,
    *,
    depth: int,
    num_draws: int,
) -> PromptDistribution:
    """Enumerate the prefixes that so many draws are expected to show `LEAST_EXPECTED` times or more."""
    logits_after = continuation_logits(orthrus, against, prompt_ids, depth)
    least, ends = LEAST_EXPECTED / num_draws, orthrus.base.eos_token_ids
    known: dict[Prefix, float] = {(): 1.0}
    by_depth: list[dict[Prefix, float]] = []
    greedy_ids: Prefix = ()
    for _ in range(depth):
        following: dict[Prefix, float] = {}
        for prefix, mass in known.items():
            if prefix and prefix[-1] in ends:
                following[prefix] = mass
                continue
            probs_V = filtered_probs(logits_after(prefix)[None], sampling)[0].double() * mass
            if prefix == greedy_ids:
                greedy_ids = (*prefix, int(probs_V.argmax()))
            for token_id in (probs_V >= least).nonzero()[:, 0].tolist():
                following[(*prefix, token_id)] = float(probs_V[token_id])
        by_depth.append(following)
        known = following
    return PromptDistribution(tuple(by_depth), greedy_ids)


def chi_square(
    distributions: Sequence[PromptDistribution], draws: Sequence[Sequence[Prefix]], depth: int
) -> Found:
    """Test the draws of each prompt against its distribution at this depth.

    draws: by prompt, the new token ids of each draw.
    """
    statistic, degrees = 0.0, 0
    for distribution, mine in zip(distributions, draws, strict=True):
        cells = distribution.by_depth[depth - 1]
        seen = Counter(ids[:depth] for ids in mine)
        masses, counts = _pooled(cells, [seen[prefix] for prefix in cells], len(mine))
        expected_N = as_row(masses) * len(mine)
        statistic += float(((as_row(counts) - expected_N) ** 2 / expected_N).sum())
        degrees += len(masses) - 1
    return Found(statistic, degrees)


def noncentrality(distributions: Sequence[PromptDistribution], depth: int, num_draws: int) -> float:
    """The noncentrality of draws that are all the greedy text: n times the sum over cells of (q - p)^2 / p.

    If a share `bias` of the draws is the greedy text, the noncentrality is bias^2 times as large.
    """
    total = 0.0
    for distribution in distributions:
        cells = distribution.by_depth[depth - 1]
        greedy = [float(distribution.greedy_ids[:depth] == prefix) for prefix in cells]
        masses, hits = _pooled(cells, greedy, num_draws, of_all=1.0)
        masses_N = as_row(masses)
        total += num_draws * float(((as_row(hits) - masses_N) ** 2 / masses_N).sum())
    return total


def power(largest: float, degrees: int, significance: float, bias: float) -> float:
    """How often the test finds a share `bias` of greedy texts among the draws. largest: from `noncentrality`."""
    if not degrees:
        return 0.0
    return chi2_power(significance, degrees, largest * bias**2)


def smallest_bias(largest: float, degrees: int, significance: float, wanted: float) -> float | None:
    """The smallest share of greedy texts that the test finds with this power, or None if it finds none."""
    if power(largest, degrees, significance, 1.0) < wanted:
        return None
    threshold = chi2_threshold(significance, degrees)
    return bisect(lambda bias: noncentral_tail(threshold, degrees, largest * bias**2) >= wanted, 0.0, 1.0)


def _pooled(
    cells: dict[Prefix, float], counts: Sequence[float], num_draws: int, of_all: float | None = None
) -> tuple[list[float], list[float]]:
    """(masses, counts), with all other prefixes in one more cell.

    If that cell would have too small an expected count, they join the least likely cell instead. of_all: the sum of
    all counts, by default the number of draws.
    """
    masses, found = list(cells.values()), [float(count) for count in counts]
    rest = max(0.0, 1.0 - sum(masses))
    others = (num_draws if of_all is None else of_all) - sum(found)
    if rest * num_draws >= LEAST_EXPECTED or not masses:
        return [*masses, rest], [*found, others]
    smallest = min(range(len(masses)), key=masses.__getitem__)
    masses[smallest] += rest
    found[smallest] += others
    return masses, found
