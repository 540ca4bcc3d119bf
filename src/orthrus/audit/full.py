"""Tests the distribution of sampled text, its length and its variety: `orthrus audit --full`.

Three samples answer a few prompts. Plain decoding draws two of them, with different seeds. Ours is drawn with the
seeds of the second one. The module `distribution` tests a sample against the exact distribution of the first tokens.
The module `distance` tests how far it is from the first plain sample. Two controls show what the tests are worth.
The negative control is the second plain sample, and no test may fail it. The positive control is a plain sample with
a planted bias, which the tests must find.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from orthrus.api import Orthrus
from orthrus.audit.answers import Answers
from orthrus.audit.chances import CONFIDENCE, holm
from orthrus.audit.distance import Pair, p_value
from orthrus.audit.distribution import (
    LEAST_EXPECTED,
    Found,
    PromptDistribution,
    chi_square,
    noncentrality,
    power,
    prompt_distribution,
    smallest_bias,
)
from orthrus.audit.full_report import ArmResult, FullReport, Power, SampleTest
from orthrus.audit.texts import text_counts, text_ratios
from orthrus.config import Baseline, DecodeConfig, SamplingParams, Strategy
from orthrus.errors import UserInputError
from orthrus.types import GenerationResult

OnStage = Callable[[str, int, int], None]
SIGNIFICANCE, POWER = 1e-3, 0.95
BIASES = (0.1, 0.2, 0.4, 0.8)
"""Further biases for which the report gives the power of a test."""
NUM_CONTROLS = 200
"""Biased samples from which the power of the distance test is estimated."""
_OTHER_TEXTS = 10**6
"""Distance between the seeds of the samples and those of the answers whose length and variety are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FullOptions:
    """How much to draw.

    draws: texts of each sample and prompt. num_prompts: prompts that are sampled, spread evenly over the audit's
    prompts. num_tokens: length limit of a sampled text. depth: number of tokens of the longest prefixes that are
    counted. bias: share of greedy texts in the positive control. concurrency: texts that share the passes.

    Raises UserInputError for a value out of range.
    """

    draws: int = 200
    num_prompts: int = 12
    num_tokens: int = 24
    depth: int = 3
    temperature: float = 1.0
    seed: int = 0
    bias: float = 0.05
    concurrency: int = 16
    strategies: tuple[Strategy, ...] = ("auto",)

    def __post_init__(self) -> None:
        least = {"draws": 20, "num_prompts": 1, "num_tokens": self.depth, "depth": 1, "concurrency": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise UserInputError(f"{name} must be at least {smallest}, not {getattr(self, name)}.")
        if not 0.0 < self.bias < 1.0:
            raise UserInputError(f"the planted bias must lie between 0 and 1, not {self.bias}.")
        if not self.temperature > 0.0:
            raise UserInputError(f"testing sampled text needs a temperature above 0, not {self.temperature}.")


def run_full(
    orthrus: Orthrus,
    against: Baseline,
    prompts: Sequence[list[int]],
    config: DecodeConfig,
    options: FullOptions,
    on_stage: OnStage,
) -> FullReport:
    """Draw the samples, test them and compare their texts.

    prompts: token ids of all prompts. config: the settings of the whole audit. No other thread may decode meanwhile.
    """
    return _Full(orthrus, against, prompts, config, options, on_stage).run()


class _Full:
    def __init__(
        self,
        orthrus: Orthrus,
        against: Baseline,
        prompts: Sequence[list[int]],
        config: DecodeConfig,
        options: FullOptions,
        on_stage: OnStage,
    ) -> None:
        self._orthrus, self._against, self._options, self._on_stage = orthrus, against, options, on_stage
        self._every, self._config = list(prompts), config
        num = min(options.num_prompts, len(prompts))
        self._places = [i * len(prompts) // num for i in range(num)]
        self._prompts = [prompts[i] for i in self._places]
        self._damages: list[str] = []
        # Holm's correction treats all tests of our samples as one family.
        self._level = SIGNIFICANCE / ((options.depth + 1) * len(options.strategies))

    def run(self) -> FullReport:
        options = self._options
        distributions = self._distributions()
        plain = [self._draw("ar", first) for first in (0, options.draws)]
        greedy = self._answers("ar", [(ids, self._settings("ar", None)) for ids in self._prompts])
        ours = {strategy: self._draw(strategy, options.draws) for strategy in options.strategies}
        pairs = self._pairs(plain[0], plain[1], greedy)
        permuted_P = self._permuted(pairs)
        biased = self._plant(plain[1], greedy)
        tests: list[SampleTest] = []
        for depth in range(1, options.depth + 1):
            tests.append(self._chi_square_test(depth, distributions, plain[1], biased, ours))
        tests.append(self._distance_test(pairs, permuted_P, plain[0], ours, greedy))
        return FullReport(
            tests=tuple(self._adjusted(tests)),
            arms=tuple(self._arm(strategy, samples, plain[1], greedy) for strategy, samples in ours.items()),
            damages=tuple(self._damages),
            options={
                "draws": options.draws,
                "prompts": [place + 1 for place in self._places],
                "num_tokens": options.num_tokens,
                "depth": options.depth,
                "temperature": options.temperature,
                "seed": options.seed,
                "bias": options.bias,
                "strategies": list(options.strategies),
                "concurrency": options.concurrency,
                "significance": SIGNIFICANCE,
                "level_of_one_test": self._level,
                "power": POWER,
                "confidence": CONFIDENCE,
                "num_permutations": len(permuted_P),
                "least_expected": LEAST_EXPECTED,
            },
        )

    # ------------------------------------------------------------------------------------- samples

    def _settings(self, strategy: Strategy, seed: int | None, num_tokens: int | None = None) -> DecodeConfig:
        """Settings of one answer; without a seed it is greedy."""
        options = self._options
        sampling = (
            SamplingParams() if seed is None else SamplingParams(temperature=options.temperature, seed=seed)
        )
        return replace(
            self._config,
            strategy=strategy,
            sampling=sampling,
            max_new_tokens=num_tokens or options.num_tokens,
        )

    def _answers(self, name: str, asks: list[tuple[list[int], DecodeConfig]]) -> list[GenerationResult]:
        answers = Answers(self._orthrus, asks, self._options.concurrency)
        for _ in answers:
            pass
        self._damages += [f"sampled text, {name}: {what}" for _, what in answers.damages]
        return answers.results

    def _draw(self, strategy: Strategy, first: int) -> list[list[GenerationResult]]:
        """Answers by prompt. Each prompt has its own seeds; `first` is the offset of the first one."""
        options, found = self._options, []
        for index, ids in enumerate(self._prompts):
            self._on_stage(f"sampling, {strategy}", index, len(self._prompts))
            start = options.seed + first + 2 * options.draws * index
            seeds = range(start, start + options.draws)
            found.append(self._answers(strategy, [(ids, self._settings(strategy, s)) for s in seeds]))
        return found

    def _distributions(self) -> list[PromptDistribution]:
        options, found = self._options, []
        for index, ids in enumerate(self._prompts):
            self._on_stage("distribution of the base", index, len(self._prompts))
            sampling = SamplingParams(temperature=options.temperature)
            distribution = prompt_distribution(
                self._orthrus, self._against, ids, sampling, depth=options.depth, num_draws=options.draws
            )
            found.append(distribution)
        return found

    def _plant(
        self, samples: list[list[GenerationResult]], greedy: list[GenerationResult]
    ) -> list[list[GenerationResult]]:
        """Replaces each text by the greedy one with the probability of the bias.

        A verifier that accepts drafts without looking has this effect.
        """
        generator = torch.Generator().manual_seed(self._options.seed)
        return [
            [
                biased if float(torch.rand((), generator=generator)) < self._options.bias else result
                for result in mine
            ]
            for mine, biased in zip(samples, greedy, strict=True)
        ]

    # --------------------------------------------------------------------------------------- tests

    def _chi_square_test(
        self,
        depth: int,
        distributions: list[PromptDistribution],
        plain: list[list[GenerationResult]],
        biased: list[list[GenerationResult]],
        ours: dict[Strategy, list[list[GenerationResult]]],
    ) -> SampleTest:
        options = self._options

        def test(samples: list[list[GenerationResult]]) -> Found:
            return chi_square(
                distributions, [[result.token_ids for result in mine] for mine in samples], depth
            )

        negative, mine = test(plain), {strategy: test(samples) for strategy, samples in ours.items()}
        settings = (noncentrality(distributions, depth, options.draws), negative.degrees, self._level)
        return SampleTest(
            name=f"chi-square, depth {depth}",
            statistics={strategy: found.statistic for strategy, found in mine.items()},
            p_values={strategy: found.p_value for strategy, found in mine.items()},
            degrees=negative.degrees,
            negative_control_statistic=negative.statistic,
            negative_control_p=negative.p_value,
            positive_control_bias=options.bias,
            positive_control_p=test(biased).p_value,
            powers=tuple(Power(bias, power(*settings, bias)) for bias in (options.bias, *BIASES)),
            smallest_bias=smallest_bias(*settings, POWER),
        )

    def _pairs(
        self,
        first: list[list[GenerationResult]],
        second: list[list[GenerationResult]],
        greedy: list[GenerationResult],
    ) -> list[Pair]:
        return [
            Pair.of([a.text for a in mine], [b.text for b in other], biased.text)
            for mine, other, biased in zip(first, second, greedy, strict=True)
        ]

    def _permuted(self, pairs: list[Pair]) -> torch.Tensor:
        """Distances under labels that are permuted within each prompt, summed over prompts.

        There are enough permutations for p-values well below the level of one test.
        """
        generator = torch.Generator().manual_seed(self._options.seed)
        num = math.ceil(4 / self._level)
        total_P = torch.zeros(num, dtype=torch.float64)
        for index, pair in enumerate(pairs):
            self._on_stage("permutations", index, len(pairs))
            total_P += pair.permuted(num, generator)
        return total_P

    def _distance_test(
        self,
        pairs: list[Pair],
        permuted_P: torch.Tensor,
        plain: list[list[GenerationResult]],
        ours: dict[Strategy, list[list[GenerationResult]]],
        greedy: list[GenerationResult],
    ) -> SampleTest:
        negative = sum(pair.distance() for pair in pairs)
        statistics: dict[str, float] = {}
        p_values: dict[str, float] = {}
        for strategy, samples in ours.items():
            mine = self._pairs(plain, samples, greedy)
            statistics[strategy] = sum(pair.distance() for pair in mine)
            p_values[strategy] = p_value(statistics[strategy], self._permuted(mine))
        generator = torch.Generator().manual_seed(self._options.seed + 1)
        threshold = float(permuted_P.quantile(1 - self._level))
        powers, controls = [], {}
        for bias in (self._options.bias, *BIASES):
            drawn_CPN = torch.rand(NUM_CONTROLS, len(pairs), pairs[0].num, generator=generator)
            found_C = sum(pair.biased(drawn_CPN[:, i] < bias) for i, pair in enumerate(pairs))
            assert isinstance(found_C, torch.Tensor), "there is a prompt"
            powers.append(Power(bias, int((found_C > threshold).sum()) / NUM_CONTROLS))
            controls[bias] = float(found_C[0])
        seen = next((each.bias for each in powers if each.power >= POWER), None)
        planted = powers[-1].bias if seen is None else seen
        return SampleTest(
            name="distance of texts (MMD)",
            statistics=statistics,
            p_values=p_values,
            degrees=None,
            negative_control_statistic=negative,
            negative_control_p=p_value(negative, permuted_P),
            positive_control_bias=planted,
            positive_control_p=p_value(controls[planted], permuted_P),
            powers=tuple(powers),
            smallest_bias=seen,
        )

    def _adjusted(self, tests: list[SampleTest]) -> list[SampleTest]:
        """Adds the p-values of our samples after Holm's correction for the number of tests."""
        keys = [(i, strategy) for i, test in enumerate(tests) for strategy in test.p_values]
        adjusted = dict(zip(keys, holm([tests[i].p_values[s] for i, s in keys]), strict=True))
        return [
            replace(test, adjusted={s: adjusted[i, s] for s in test.p_values}, level=self._level)
            for i, test in enumerate(tests)
        ]

    # --------------------------------------------------------------------------------------- texts

    def _arm(
        self,
        strategy: Strategy,
        samples: list[list[GenerationResult]],
        plain: list[list[GenerationResult]],
        greedy: list[GenerationResult],
    ) -> ArmResult:
        same = [
            mine.token_ids == theirs.token_ids
            for many, others in zip(samples, plain, strict=True)
            for mine, theirs in zip(many, others, strict=True)
        ]
        stats = [result.stats for mine in samples for result in mine]
        drafted = sum(s.num_drafted for s in stats)
        first, second = self._plain_counts
        third = self._long_counts(strategy, 2)
        return ArmResult(
            strategy=strategy,
            num_texts=len(same),
            num_equal_by_seed=sum(same),
            acceptance_rate=sum(s.num_accepted for s in stats) / drafted if drafted else None,
            ratios=text_ratios(third, first),
            negative_control_ratios=text_ratios(second, first),
        )

    @cached_property
    def _plain_counts(self) -> list[list[dict[str, float]]]:
        return [self._long_counts("ar", which) for which in (0, 1)]

    def _long_counts(self, strategy: Strategy, which: int) -> list[dict[str, float]]:
        """Counts of one answer to every prompt, with the audit's own length limit."""
        start = self._options.seed + _OTHER_TEXTS * (which + 1)
        length = self._config.max_new_tokens
        asks = [
            (ids, self._settings(strategy, start + index, length)) for index, ids in enumerate(self._every)
        ]
        self._on_stage(f"whole texts, {strategy}", 0, len(asks))
        return [text_counts(r.text, len(r.token_ids)) for r in self._answers(strategy, asks)]
