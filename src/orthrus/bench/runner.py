"""Run every arm on every prompt, interleaved, so that a drift of the machine hits all arms alike."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

from orthrus.api import Orthrus
from orthrus.base.bench_prompts import BenchPrompt
from orthrus.base.provenance import provenance
from orthrus.bench.cycles import without_reuse
from orthrus.bench.layout import law
from orthrus.bench.metrics import PLAIN, STOCK, Run, run_of_stats, run_of_stock
from orthrus.bench.report import BenchReport
from orthrus.config import DecodeConfig, SamplingParams, Strategy
from orthrus.engine.limits import check_block_size, check_prompt
from orthrus.engine.stock import stock_generate
from orthrus.errors import UserInputError

WARMUP_TOKENS = 16
_DEFAULTS = DecodeConfig()

OnProgress = Callable[[str, int, int], None]
"""Called with (what is running, runs done, runs in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure. `strategies` come on top of the arms "stock" and "ar", which always run.

    `warmup` rounds of all arms, 16 tokens each on the first prompt, come first and are not counted.
    Every temperature gives numbers of its own; above 0, repeat n samples with seed + n (None counts as 0).
    """

    prompts: Sequence[BenchPrompt]
    strategies: tuple[Strategy, ...] = ("chain",)
    temperatures: tuple[float, ...] = (0.0,)
    max_new_tokens: int = 128
    block_size: int | None = None
    node_budget: int = _DEFAULTS.node_budget
    block_budget: int = _DEFAULTS.block_budget
    seed: int | None = 0
    repeats: int = 3
    warmup: int = 1

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserInputError("there is nothing to measure; give at least one prompt.")
        if not self.temperatures:
            raise UserInputError("there is nothing to measure; give at least one temperature.")
        for name in ("strategies", "temperatures"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserInputError(f"the {name} hold one twice; give each once.")
        if self.repeats < 1:
            raise UserInputError(f"repeats must be at least 1, not {self.repeats}.")
        if self.warmup < 0:
            raise UserInputError(f"warmup must be 0 or more, not {self.warmup}.")
        # Checks the remaining values, in the words of a request.
        for strategy in self.strategies:
            for temperature in self.temperatures:
                self.config(strategy, temperature, self.seed, self.max_new_tokens)

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((STOCK, PLAIN, *self.strategies)))

    def config(
        self, strategy: Strategy, temperature: float, seed: int | None, max_new_tokens: int
    ) -> DecodeConfig:
        """The request of one run of ours."""
        return DecodeConfig(
            max_new_tokens=max_new_tokens,
            strategy=strategy,
            block_size=self.block_size,
            node_budget=self.node_budget,
            block_budget=self.block_budget,
            sampling=SamplingParams(temperature=temperature, seed=seed),
        )


def run_bench(orthrus: Orthrus, options: BenchOptions, on_progress: OnProgress | None = None) -> BenchReport:
    """Measure the stock model's own `generate`, our plain decoding and the strategies on the same prompts.

    No arm keeps a prompt's history for its next run. No other thread may decode meanwhile. Raises
    UserInputError for a prompt or block size that does not fit the model.
    """
    orthrus = without_reuse(orthrus)
    prompts = [orthrus.base.encode_prompt(prompt.prompt) for prompt in options.prompts]
    for prompt_ids in prompts:
        check_prompt(prompt_ids, orthrus.base.context_length)
    check_block_size(orthrus.dual, options.block_size)
    jobs = _jobs(options, prompts)
    runs: list[Run] = []
    outputs: dict[tuple[float, int, int, str], tuple[int, ...]] = {}
    for done, job in enumerate(jobs):
        if on_progress is not None:
            on_progress(job.title, done, len(jobs))
        run, token_ids = _decode(orthrus, options, job)
        if not job.warmup:
            runs.append(run)
            outputs[job.temperature, job.prompt_index, job.repeat, job.arm] = token_ids
    if on_progress is not None:
        on_progress("done", len(jobs), len(jobs))
    model = orthrus.describe()
    settings = {k: getattr(options, k) for k in options.__slots__ if k != "prompts"}
    # Lists, as they come back from JSON.
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return BenchReport(
        runs=tuple(replace(run, equal_to_plain=_equal_to_plain(run, outputs)) for run in runs),
        model=model,
        options=settings
        | {
            "arms": list(options.arms),
            "num_prompts": len(prompts),
            "prompts_digest": prompts_digest(options.prompts),
        },
        provenance=provenance(device=model["device"], dtype=model["dtype"], seed=options.seed),
    )


def prompts_digest(prompts: Sequence[BenchPrompt]) -> str:
    """A short name for exactly these prompts, in this order: "blake2b:" and 32 hex digits."""
    text = json.dumps([[p.domain, p.prompt] for p in prompts], sort_keys=True)
    return f"blake2b:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


class _Job(NamedTuple):
    arm: str
    prompt_ids: list[int]
    prompt_index: int
    domain: str
    repeat: int
    temperature: float
    max_new_tokens: int
    warmup: bool

    @property
    def title(self) -> str:
        if self.warmup:
            return f"warm-up: {self.arm}"
        where = f"{self.domain}, prompt {self.prompt_index + 1}, repeat {self.repeat + 1}"
        return f"{where}, {law(self.temperature)}: {self.arm}"


def _jobs(options: BenchOptions, prompts: list[list[int]]) -> list[_Job]:
    arms = options.arms
    short = min(WARMUP_TOKENS, options.max_new_tokens)
    jobs = [
        _Job(arm, prompts[0], 0, "", 0, temperature, short, True)
        for _ in range(options.warmup)
        for temperature in options.temperatures
        for arm in arms
    ]
    for index, (prompt, ids) in enumerate(zip(options.prompts, prompts, strict=True)):
        for repeat in range(options.repeats):
            # Each arm has its turn at going first.
            shift = (index * options.repeats + repeat) % len(arms)
            jobs += [
                _Job(arm, ids, index, prompt.domain, repeat, temperature, options.max_new_tokens, False)
                for temperature in options.temperatures
                for arm in arms[shift:] + arms[:shift]
            ]
    return jobs


def _decode(orthrus: Orthrus, options: BenchOptions, job: _Job) -> tuple[Run, tuple[int, ...]]:
    """One run, and its tokens."""
    seed, num_prompt_tokens = (options.seed or 0) + job.repeat, len(job.prompt_ids)
    about = job.prompt_index, job.domain, job.repeat, job.temperature
    if job.arm == STOCK:
        model = orthrus.stock()
        stock = stock_generate(
            model,
            job.prompt_ids,
            max_new_tokens=min(job.max_new_tokens, orthrus.base.context_length - num_prompt_tokens),
            eos_token_ids=orthrus.base.eos_token_ids,
            temperature=job.temperature,
            seed=seed,
        )
        return run_of_stock(*about, num_prompt_tokens, stock), stock.token_ids
    config = options.config(cast(Strategy, job.arm), job.temperature, seed, job.max_new_tokens)
    ours = orthrus.stream_ids(job.prompt_ids, config).drain()
    return run_of_stats(job.arm, *about, ours.stats), ours.token_ids


def _equal_to_plain(run: Run, outputs: dict[tuple[float, int, int, str], tuple[int, ...]]) -> bool | None:
    """Greedy text against the stock model's first; sampled text against that of ar with the same seed."""
    key = run.temperature, run.prompt_index
    if run.temperature == 0.0:
        plain = outputs[*key, 0, STOCK]
    elif run.arm == STOCK:
        return None
    else:
        plain = outputs[*key, run.repeat, PLAIN]
    return outputs[*key, run.repeat, run.arm] == plain
