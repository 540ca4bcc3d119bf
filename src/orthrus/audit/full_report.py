"""The results of the tests of sampled text, with the controls and the power of each test."""

from dataclasses import asdict, dataclass, field
from typing import Any

from orthrus.audit.chances import largest_rate
from orthrus.audit.texts import FORMULAS, TextRatio
from orthrus.base.markdown import markdown_table

FULL_LEGEND = {
    "chi-square": "sum over prompts and prefixes of (seen - n p)^2 / (n p), where p is the base's own "
    "probability of the prefix at this depth; prefixes expected fewer than 5 times in n draws are one cell",
    "distance": "sum over prompts of the unbiased squared maximum mean discrepancy between our texts and plain "
    "decoding's texts with other seeds; kernel: share of the first 100 characters that agree; p-value: share of "
    "label permutations within each prompt that give at least this statistic (arXiv 2410.20247)",
    "p": "probability that a right sampler gives at least this statistic; adjusted: by Holm, over all tests of ours",
    "negative_control": "the same test of plain decoding, by the same runner; it must not fail",
    "positive_control": "the same test after a share of plain decoding's texts (the bias) was replaced by the "
    "greedy text, as a verifier does that accepts drafts unverified; it must fail",
    "power": "how often the test finds such a bias at the level of one test (significance / tests): from the "
    "noncentral chi-square distribution, or from 200 biased samples",
    "smallest_bias": "the smallest bias that is found with power 0.95; for the distance, among those tried",
    "equal_by_seed": "texts that equal plain decoding's text with the same seed, token for token",
    "ratio": "sum over prompts of a count in our texts / the same in plain decoding's texts with other seeds, one "
    "text a prompt; interval: 95 % bootstrap over prompts; expected 1.00; negative_control: plain decoding / plain "
    "decoding",
    **FORMULAS,
}


@dataclass(frozen=True, slots=True)
class Power:
    """How often a test finds this bias."""

    bias: float
    power: float


@dataclass(frozen=True, slots=True)
class SampleTest:
    """One test of our samples, by strategy, and of both controls.

    degrees: degrees of freedom, None for the distance. level: the significance of one test, with which the p-values
    of the controls are compared.
    """

    name: str
    statistics: dict[str, float]
    p_values: dict[str, float]
    degrees: int | None
    negative_control_statistic: float
    negative_control_p: float
    positive_control_bias: float
    positive_control_p: float
    powers: tuple[Power, ...]
    smallest_bias: float | None
    adjusted: dict[str, float] = field(default_factory=dict)
    level: float = 0.0

    @property
    def finds_positive_control(self) -> bool:
        return self.positive_control_p < self.level


@dataclass(frozen=True, slots=True)
class ArmResult:
    """The sampled texts of one strategy."""

    strategy: str
    num_texts: int
    num_equal_by_seed: int
    acceptance_rate: float | None
    ratios: tuple[TextRatio, ...]
    negative_control_ratios: tuple[TextRatio, ...]

    @property
    def bound(self) -> str:
        return bound(self.num_texts - self.num_equal_by_seed, self.num_texts, "texts of the same seed")


@dataclass(frozen=True)
class FullReport:
    """The results of `audit --full`. `damages`: slot caches that broke their invariant while texts were sampled."""

    tests: tuple[SampleTest, ...]
    arms: tuple[ArmResult, ...]
    damages: tuple[str, ...]
    options: dict[str, Any]

    @property
    def failures(self) -> list[str]:
        """Sentences, one for each reason why the audit cannot pass."""
        significance, level = self.options["significance"], self.options["level_of_one_test"]
        found = [
            f"{strategy} does not have the base's distribution ({test.name}: adjusted p {p:.2g})"
            for test in self.tests
            for strategy, p in test.adjusted.items()
            if p < significance
        ]
        found += [
            f"plain decoding itself does not have the base's distribution "
            f"({test.name}: p {test.negative_control_p:.2g})"
            for test in self.tests
            if test.negative_control_p < level
        ]
        bias = self.options["bias"]
        if not any(test.finds_positive_control and test.positive_control_bias <= bias for test in self.tests):
            found.append(f"no test finds a planted bias of {bias:.0%}: draw more texts")
        return found

    @property
    def summary(self) -> str:
        """In one sentence."""
        best = [t.smallest_bias for t in self.tests if t.smallest_bias is not None]
        sees = (
            f"a bias of {min(best):.1%} would be found with power 0.95" if best else "no bias would be found"
        )
        texts = "; ".join(f"{arm.strategy}: {arm.bound}" for arm in self.arms)
        verdict = "; ".join(self.failures) or "no test distinguishes ours from the base's distribution"
        return f"sampled text: {verdict}; {sees}; {texts}."

    def to_dict(self) -> dict[str, Any]:
        return {
            "summary": self.summary,
            "failures": self.failures,
            "options": self.options,
            "legend": FULL_LEGEND,
            "tests": [
                asdict(test) | {"finds_positive_control": test.finds_positive_control} for test in self.tests
            ],
            "texts": [asdict(arm) | {"bound": arm.bound} for arm in self.arms],
        }

    @property
    def test_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and lines."""
        header = [
            "test",
            "strategy",
            "statistic",
            "degrees",
            "p",
            "adjusted",
            "negative_control",
            "positive_control",
            "power",
            "smallest_bias",
        ]
        lines = [
            [
                test.name,
                strategy,
                f"{test.statistics[strategy]:.4g}",
                "–" if test.degrees is None else str(test.degrees),
                f"{test.p_values[strategy]:.3g}",
                f"{test.adjusted[strategy]:.3g}",
                f"{test.negative_control_p:.3g}",
                f"{test.positive_control_bias:.0%}: p {test.positive_control_p:.2g}"
                f"{'' if test.finds_positive_control else ', NOT FOUND'}",
                ", ".join(f"{each.bias:.0%}: {each.power:.2f}" for each in test.powers[:2]),
                "–" if test.smallest_bias is None else f"{test.smallest_bias:.1%}",
            ]
            for test in self.tests
            for strategy in test.statistics
        ]
        return header, lines

    @property
    def text_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and lines."""
        header = [
            "strategy",
            "count",
            "ratio",
            "interval",
            "negative_control",
            "control_interval",
            "seen_from",
        ]
        lines = [
            [
                arm.strategy,
                ratio.what,
                f"{ratio.ratio:.3f}",
                f"{ratio.low:.3f} to {ratio.high:.3f}",
                f"{control.ratio:.3f}",
                f"{control.low:.3f} to {control.high:.3f}",
                f"{ratio.seen:.0%}",
            ]
            for arm in self.arms
            for ratio, control in zip(arm.ratios, arm.negative_control_ratios, strict=True)
        ]
        return header, lines

    def to_markdown(self) -> str:
        tables = [markdown_table(*self.test_table), "", markdown_table(*self.text_table), ""]
        return "\n".join([*tables, *(f"- `{name}`: {formula}" for name, formula in FULL_LEGEND.items())])


def bound(num_different: int, num_runs: int, of_what: str) -> str:
    """A clause: the observed differences, and the upper bound on their rate."""
    rate = largest_rate(num_different, num_runs)
    return f"{num_different} of {num_runs} {of_what} differ; the rate is at most {rate:.2%} (95 % confidence)"
