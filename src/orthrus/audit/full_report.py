"""What the tests of sampled text found, with the floor, the negative control and the power of each."""

from dataclasses import asdict, dataclass, field
from typing import Any

from orthrus.audit.chances import largest_rate
from orthrus.audit.texts import FORMULAS, TextRatio
from orthrus.base.markdown import markdown_table

FULL_LEGEND = {
    "chi-square": "sum over prompts and prefixes of (seen - n p)^2 / (n p), where p is the base's own "
    "probability of the prefix at this depth; prefixes expected fewer than 5 times in n draws are one cell",
    "distance": "sum over prompts of the unbiased squared maximum mean discrepancy between ours and plain "
    "decoding's texts of other seeds; kernel: share of the first 100 characters that agree; p-value: share of "
    "random labels, permuted within each prompt, that give at least as much (arXiv 2410.20247)",
    "p": "how likely a right sampler gives at least this statistic; adjusted: by Holm, for all tests of ours",
    "floor": "the same test of plain decoding, by the same runner",
    "control": "the same test after a share of plain decoding's texts (the bias) was replaced by the greedy "
    "text, as a verifier does that takes drafts unseen; it must fail",
    "power": "how often the test finds such a bias at the level of one test (significance / tests): from the "
    "noncentral chi-square law, or from 200 controls",
    "smallest_bias": "the least bias found with power 0.95; of the distance, among those tried",
    "equal_by_seed": "texts that equal plain decoding's of the same seed, token for token",
    "ratio": "sum over prompts of a count of ours / the same of plain decoding with other seeds, one text a "
    "prompt; interval: 95 % of a bootstrap over prompts; floor: plain decoding / plain decoding; expected 1.00",
    **FORMULAS,
}


@dataclass(frozen=True, slots=True)
class Power:
    """How often a test finds this bias."""

    bias: float
    power: float


@dataclass(frozen=True, slots=True)
class LawTest:
    """One test of ours, by strategy, beside floor and control. degrees: None for the distance; level: what a
    p-value of floor or control is compared with."""

    name: str
    statistics: dict[str, float]
    p_values: dict[str, float]
    degrees: int | None
    floor_statistic: float
    floor_p: float
    control_bias: float
    control_p: float
    powers: tuple[Power, ...]
    smallest_bias: float | None
    adjusted: dict[str, float] = field(default_factory=dict)
    level: float = 0.0

    @property
    def sees_control(self) -> bool:
        return self.control_p < self.level


@dataclass(frozen=True, slots=True)
class ArmResult:
    """The sampled texts of one strategy."""

    strategy: str
    num_texts: int
    num_equal_by_seed: int
    acceptance_rate: float | None
    ratios: tuple[TextRatio, ...]
    floor_ratios: tuple[TextRatio, ...]

    @property
    def bound(self) -> str:
        return bound(self.num_texts - self.num_equal_by_seed, self.num_texts, "texts of the same seed")


@dataclass(frozen=True)
class FullReport:
    """`damages`: slot caches that broke their invariant while texts were sampled."""

    tests: tuple[LawTest, ...]
    arms: tuple[ArmResult, ...]
    damages: tuple[str, ...]
    options: dict[str, Any]

    @property
    def failures(self) -> list[str]:
        """Sentences, one for each reason why the audit cannot pass."""
        significance, level = self.options["significance"], self.options["level_of_one_test"]
        found = [
            f"{strategy} does not have the base's law ({test.name}: adjusted p {p:.2g})"
            for test in self.tests
            for strategy, p in test.adjusted.items()
            if p < significance
        ]
        found += [
            f"plain decoding itself does not have the base's law ({test.name}: p {test.floor_p:.2g})"
            for test in self.tests
            if test.floor_p < level
        ]
        bias = self.options["bias"]
        if not any(test.sees_control and test.control_bias <= bias for test in self.tests):
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
        verdict = "; ".join(self.failures) or "no test tells ours from the base's law"
        return f"sampled text: {verdict}; {sees}; {texts}."

    def to_dict(self) -> dict[str, Any]:
        return {
            "summary": self.summary,
            "failures": self.failures,
            "options": self.options,
            "legend": FULL_LEGEND,
            "tests": [asdict(test) | {"sees_control": test.sees_control} for test in self.tests],
            "texts": [asdict(arm) | {"bound": arm.bound} for arm in self.arms],
        }

    @property
    def test_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and lines."""
        header = ["test", "strategy", "statistic", "degrees", "p", "adjusted", "floor_p", "control", "power",
                  "smallest_bias"]  # fmt: skip
        lines = [
            [
                test.name,
                strategy,
                f"{test.statistics[strategy]:.4g}",
                "–" if test.degrees is None else str(test.degrees),
                f"{test.p_values[strategy]:.3g}",
                f"{test.adjusted[strategy]:.3g}",
                f"{test.floor_p:.3g}",
                f"{test.control_bias:.0%}: p {test.control_p:.2g}{'' if test.sees_control else ', NOT FOUND'}",
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
        header = ["strategy", "count", "ratio", "interval", "floor", "floor_interval", "seen_from"]
        lines = [
            [
                arm.strategy,
                ratio.what,
                f"{ratio.ratio:.3f}",
                f"{ratio.low:.3f} to {ratio.high:.3f}",
                f"{floor.ratio:.3f}",
                f"{floor.low:.3f} to {floor.high:.3f}",
                f"{ratio.seen:.0%}",
            ]
            for arm in self.arms
            for ratio, floor in zip(arm.ratios, arm.floor_ratios, strict=True)
        ]
        return header, lines

    def to_markdown(self) -> str:
        tables = [markdown_table(*self.test_table), "", markdown_table(*self.text_table), ""]
        return "\n".join([*tables, *(f"- `{name}`: {formula}" for name, formula in FULL_LEGEND.items())])


def bound(num_different: int, num_runs: int, of_what: str) -> str:
    """What so few differences in so many runs say about the rate, as a clause."""
    rate = largest_rate(num_different, num_runs)
    return f"{num_different} of {num_runs} {of_what} differ, so at most {rate:.2%} do (95 % confidence)"
