"""Every prompt decoded by a baseline and by each strategy, token for token.

The baseline is the stock model's own `generate`, or plain decoding by the same runner.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor

from orthrus.api import Orthrus, Prompt
from orthrus.audit.explain import explain
from orthrus.audit.report import AuditReport, Mismatch, StrategyResult
from orthrus.base.provenance import provenance
from orthrus.config import BASELINES, FIXED_STRATEGIES, Baseline, DecodeConfig, SamplingParams, Strategy
from orthrus.decoding.noise import exponential_noise
from orthrus.decoding.sampling import filtered_probs
from orthrus.engine.stock import stock_generate, watch_caches
from orthrus.engine.stream import check_block_size, check_prompt
from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView
from orthrus.types import GenerationResult

OnProgress = Callable[[str, int, int], None]
"""Called with (what is running, runs done, runs in all)."""


class AuditPrompt(Protocol):
    """Anything that carries a prompt: text, or chat messages."""

    @property
    def prompt(self) -> Prompt: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOptions:
    """What to compare, and with which baseline; other fields as in DecodeConfig and SamplingParams.

    against: "stock", "plain", or None for `default_baseline`. With a temperature above 0 the baseline draws
    too, with the very noise that ours draws with: then even sampled texts must be equal, token for token.
    Raises UserInputError for a value out of range.
    """

    prompts: Sequence[AuditPrompt]
    against: Baseline | None = None
    strategies: tuple[Strategy, ...] = FIXED_STRATEGIES
    max_new_tokens: int = 128
    block_size: int | None = None
    node_budget: int = 24
    block_budget: int = 3
    floor: bool = True
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or not self.strategies:
            raise UserInputError("there is nothing to audit; give at least one prompt and one strategy.")
        if self.against is not None and self.against not in BASELINES:
            raise UserInputError(f"against must be one of {', '.join(BASELINES)}, not {self.against!r}.")
        for strategy in self.strategies:
            self.decode_config(strategy)

    def decode_config(self, strategy: Strategy) -> DecodeConfig:
        return DecodeConfig(
            max_new_tokens=self.max_new_tokens,
            strategy=strategy,
            block_size=self.block_size,
            node_budget=self.node_budget,
            block_budget=self.block_budget,
            floor=self.floor,
            sampling=SamplingParams(temperature=self.temperature, seed=self.seed),
        )


def default_baseline(dual: DualView) -> Baseline:
    """Plain decoding where another runner than the stock code rounds in less than float32: near-ties against
    the stock model are then a matter of course, and lossless means equal to plain decoding by that runner."""
    in_float32 = dual.dtype == torch.float32 and dual.precision is None
    return "stock" if dual.runner == "eager" or in_float32 else "plain"


def run_audit(orthrus: Orthrus, options: AuditOptions, on_progress: OnProgress | None = None) -> AuditReport:
    """Compare, and explain every first difference of two outputs; see `orthrus.audit.explain`.

    After each run the slot cache is checked too: every committed slot must be the AR view's own. Raises
    UserInputError for a prompt or block size that does not fit the model.
    """
    base = orthrus.base
    prompts = [base.encode_prompt(prompt.prompt) for prompt in options.prompts]
    for prompt_ids in prompts:
        check_prompt(prompt_ids, base.context_length)
    check_block_size(orthrus.dual, options.block_size)
    against = options.against or default_baseline(orthrus.dual)
    strategies = tuple(dict.fromkeys(options.strategies))
    results: dict[Strategy, list[GenerationResult]] = {strategy: [] for strategy in strategies}
    mismatches: list[Mismatch] = []
    damages: list[str] = []
    total = len(prompts) * (1 + len(strategies))
    report = on_progress or (lambda *_: None)
    for index, prompt_ids in enumerate(prompts):
        done = index * (1 + len(strategies))
        report(f"prompt {index + 1}: {against}", done, total)
        baseline_ids, damage = _baseline(orthrus, against, prompt_ids, options.decode_config("ar"))
        damages += [f"prompt {index + 1}, baseline: {what}" for what in damage]
        for number, strategy in enumerate(strategies, start=1):
            report(f"prompt {index + 1}: {strategy}", done + number, total)
            config = options.decode_config(strategy)
            result, damage = _decode(orthrus, prompt_ids, config)
            results[strategy].append(result)
            damages += [f"prompt {index + 1}, {strategy}: {what}" for what in damage]
            if result.token_ids != baseline_ids:
                mismatches.append(
                    _mismatch(orthrus, against, prompt_ids, config, index, baseline_ids, result.token_ids)
                )
    report("done", total, total)
    about = orthrus.describe()
    return AuditReport(
        strategies=tuple(_result(name, results[name], mismatches) for name in strategies),
        mismatches=tuple(mismatches),
        damages=tuple(damages),
        model=about,
        options={
            "num_prompts": len(prompts),
            "against": against,
            "strategies": strategies,
            "max_new_tokens": options.max_new_tokens,
            "block_size": options.block_size,
            "node_budget": options.node_budget,
            "block_budget": options.block_budget,
            "floor": options.floor,
            "temperature": options.temperature,
        },
        provenance=provenance(
            device=about["device"], dtype=about["dtype"], seed=options.seed if options.temperature else None
        ),
    )


class NoisyChoice(LogitsProcessor):
    """Makes the stock model's greedy `generate` draw: each token is argmax(p / e), e the noise of the seed
    and of the token's place in the whole sequence."""

    def __init__(self, temperature: float, seed: int) -> None:
        self._params = SamplingParams(temperature=temperature)
        self._seed = seed

    def __call__(self, input_ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        vocab_size, position = logits_BV.shape[-1], input_ids_BT.shape[1]
        noise_1V = exponential_noise(self._seed, [position], vocab_size, logits_BV.device)
        return filtered_probs(logits_BV, self._params) / noise_1V


def _baseline(
    orthrus: Orthrus, against: Baseline, prompt_ids: list[int], config: DecodeConfig
) -> tuple[tuple[int, ...], list[str]]:
    """The baseline's new tokens, and what is wrong with the slot cache that it leaves behind, if any."""
    if against == "plain":
        result, damages = _decode(orthrus, prompt_ids, config)
        return result.token_ids, damages
    base, sampling = orthrus.base, config.sampling
    model = orthrus.stock()
    run = stock_generate(
        model,
        prompt_ids,
        max_new_tokens=min(config.max_new_tokens, base.context_length - len(prompt_ids)),
        eos_token_ids=base.eos_token_ids,
        processor=None if sampling.greedy else NoisyChoice(sampling.temperature, sampling.seed or 0),
    )
    return run.token_ids, []


def _decode(
    orthrus: Orthrus, prompt_ids: list[int], config: DecodeConfig
) -> tuple[GenerationResult, list[str]]:
    """The result, and what is wrong with the cache that it leaves behind."""
    damages = []
    with watch_caches(orthrus.dual) as caches:
        result = orthrus.stream_ids(prompt_ids, config).drain()
    for cache in caches:
        try:
            cache.check()
        except AssertionError as e:
            damages.append(str(e))
    return result, damages


def _mismatch(
    orthrus: Orthrus,
    against: Baseline,
    prompt_ids: list[int],
    config: DecodeConfig,
    index: int,
    baseline_ids: tuple[int, ...],
    our_ids: tuple[int, ...],
) -> Mismatch:
    position = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(baseline_ids, our_ids, strict=False))
    )
    found = explain(orthrus, against, prompt_ids, config, baseline_ids, our_ids, position)
    tokens = [ids[position] if position < len(ids) else None for ids in (baseline_ids, our_ids)]
    texts = ["" if i is None else str(orthrus.base.tokenizer.decode([i])) for i in tokens]
    return Mismatch(
        strategy=config.strategy,
        prompt_index=index,
        position=position,
        baseline_token=tokens[0],
        our_token=tokens[1],
        baseline_text=texts[0],
        our_text=texts[1],
        gap=found.gap,
        noise=found.noise,
        drift=found.drift,
        residue=found.residue,
        noise_by_shape=dict(found.noise_by_shape),
        verdict=found.verdict,
        reason=found.reason,
    )


def _result(
    strategy: Strategy, results: list[GenerationResult], mismatches: list[Mismatch]
) -> StrategyResult:
    mine = [m for m in mismatches if m.strategy == strategy]
    stats = [result.stats for result in results]
    drafted = sum(s.num_drafted for s in stats)
    num_tokens = sum(s.num_tokens for s in stats)
    return StrategyResult(
        strategy=strategy,
        num_prompts=len(results),
        num_identical=len(results) - len(mine),
        num_near_ties=sum(m.verdict == "near-tie" for m in mine),
        num_broken=sum(m.verdict == "broken rule" for m in mine),
        num_tokens=num_tokens,
        acceptance_rate=sum(s.num_accepted for s in stats) / drafted if drafted else None,
        tokens_per_forward=num_tokens / sum(s.num_passes for s in stats),
    )
