"""Decodes every prompt by a baseline and by each strategy, and compares them token for token.

The baseline is the stock model's own `generate`, or plain decoding by the same runner.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor

from orthrus.api import Orthrus, Prompt
from orthrus.audit.answers import Answers
from orthrus.audit.explain import explain, first_difference
from orthrus.audit.full import FullOptions, run_full
from orthrus.audit.report import AuditReport, Mismatch, StrategyResult
from orthrus.audit.soundness import model_faults
from orthrus.base.provenance import provenance
from orthrus.config import BASELINES, FIXED_STRATEGIES, Baseline, DecodeConfig, SamplingParams, Strategy
from orthrus.decoding.noise import exponential_noise
from orthrus.decoding.sampling import filtered_probs
from orthrus.engine.limits import check_block_size, check_prompt
from orthrus.engine.stock import stock_generate
from orthrus.errors import UserInputError
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

    against: "stock", "plain", or None for `default_baseline`. With a temperature above 0 the baseline draws with the
    same noise as ours, so sampled texts must be equal too, token for token. concurrency: requests that share the
    passes of our side; the baseline always answers one at a time. full: also test the distribution of sampled text,
    its length and its variety, see `orthrus.audit.full`.
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
    concurrency: int = 1
    full: FullOptions | None = None

    def __post_init__(self) -> None:
        if not self.prompts or not self.strategies:
            raise UserInputError("there is nothing to audit; give at least one prompt and one strategy.")
        if self.against is not None and self.against not in BASELINES:
            raise UserInputError(f"against must be one of {', '.join(BASELINES)}, not {self.against!r}.")
        if type(self.concurrency) is not int or self.concurrency < 1:
            raise UserInputError(f"concurrency must be a whole number from 1, not {self.concurrency!r}.")
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


def default_baseline(orthrus: Orthrus) -> Baseline:
    """ "plain" for a compiled or captured runner in a precision below float32, "stock" otherwise.

    There the runner rounds differently from the stock code, so near-ties with the stock model are common. Lossless
    then means equal to plain decoding by the same runner.
    """
    dual = orthrus.dual
    in_float32 = dual.dtype == torch.float32 and dual.precision is None
    return "stock" if orthrus.engine.runner.name == "eager" or in_float32 else "plain"


def run_audit(orthrus: Orthrus, options: AuditOptions, on_progress: OnProgress | None = None) -> AuditReport:
    """Compare the outputs, and explain every first difference; see `orthrus.audit.explain`.

    Each strategy answers all prompts through an engine of its own, `options.concurrency` at a time. A replay of the
    request alone explains a difference. Whenever a request gives its slots back, the audit checks that the AR view
    wrote every committed slot. No other thread may decode meanwhile.
    Raises UserInputError for a prompt or block size that does not fit the model.
    """
    base = orthrus.base
    prompts = [base.encode_prompt(prompt.prompt) for prompt in options.prompts]
    for prompt_ids in prompts:
        check_prompt(prompt_ids, base.context_length)
    check_block_size(orthrus.dual, options.block_size)
    against = options.against or default_baseline(orthrus)
    strategies = tuple(dict.fromkeys(options.strategies))
    total = len(prompts) * (1 + len(strategies))
    report = on_progress or (lambda *_: None)
    damages: list[str] = []

    def answers(config: DecodeConfig, name: str, done: int, concurrency: int) -> list[GenerationResult]:
        run = Answers(orthrus, [(ids, config) for ids in prompts], concurrency)
        for num_answers in run:
            report(name, done + num_answers, total)
        damages.extend(f"prompt {index + 1}, {name}: {what}" for index, what in run.damages)
        return run.results

    if against == "plain":
        plain = answers(options.decode_config("ar"), "baseline", 0, 1)
        baselines = [result.token_ids for result in plain]
    else:
        baselines = []
        for done, prompt_ids in enumerate(prompts):
            report("baseline", done, total)
            baselines.append(_stock_ids(orthrus, prompt_ids, options.decode_config("ar")))
    results: dict[Strategy, list[GenerationResult]] = {}
    mismatches: list[Mismatch] = []
    for number, strategy in enumerate(strategies, start=1):
        config = options.decode_config(strategy)
        mine = answers(config, strategy, number * len(prompts), options.concurrency)
        results[strategy] = mine
        for index, (prompt_ids, ids, result) in enumerate(zip(prompts, baselines, mine, strict=True)):
            if result.token_ids != ids:
                mismatches.append(
                    _mismatch(orthrus, against, prompt_ids, config, index, ids, result.token_ids)
                )
    full = None
    if options.full is not None:
        full = run_full(orthrus, against, prompts, options.decode_config("ar"), options.full, report)
        damages.extend(full.damages)
    report("done", total, total)
    about = orthrus.describe()
    return AuditReport(
        strategies=tuple(_result(name, results[name], mismatches) for name in strategies),
        mismatches=tuple(mismatches),
        damages=tuple(damages),
        faults=tuple(model_faults(orthrus)),
        full=full,
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
            "concurrency": options.concurrency,
        },
        provenance=provenance(
            device=about["device"], dtype=about["dtype"], seed=options.seed if options.temperature else None
        ),
    )


class NoisyChoice(LogitsProcessor):
    """Makes the stock model's greedy `generate` sample.

    Each token is argmax(p / e), where e is the noise of the seed and of the token's position in the whole sequence.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        self._params = SamplingParams(temperature=temperature)
        self._seed = seed

    def __call__(self, input_ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        vocab_size, position = logits_BV.shape[-1], input_ids_BT.shape[1]
        noise_1V = exponential_noise(self._seed, [position], vocab_size, logits_BV.device)
        return filtered_probs(logits_BV, self._params) / noise_1V


def _stock_ids(orthrus: Orthrus, prompt_ids: list[int], config: DecodeConfig) -> tuple[int, ...]:
    """The stock model's new tokens."""
    base, sampling = orthrus.base, config.sampling
    run = stock_generate(
        orthrus.stock(),
        prompt_ids,
        max_new_tokens=min(config.max_new_tokens, base.context_length - len(prompt_ids)),
        eos_token_ids=base.eos_token_ids,
        processor=None if sampling.greedy else NoisyChoice(sampling.temperature, sampling.seed or 0),
    )
    return run.token_ids


def _mismatch(
    orthrus: Orthrus,
    against: Baseline,
    prompt_ids: list[int],
    config: DecodeConfig,
    index: int,
    baseline_ids: tuple[int, ...],
    our_ids: tuple[int, ...],
) -> Mismatch:
    position = first_difference(baseline_ids, our_ids)
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
        **asdict(found),
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
