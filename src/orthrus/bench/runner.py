"""Run every arm on every prompt, interleaved, so that a drift of the machine hits all arms alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

from orthrus.api import Orthrus, decode_config
from orthrus.base.provenance import provenance
from orthrus.bench.metrics import STOCK, Run, run_of_stats, run_of_stock
from orthrus.bench.prompts import BenchPrompt
from orthrus.bench.report import BenchReport
from orthrus.config import STRATEGIES, Strategy
from orthrus.engine.probe import stock_generate
from orthrus.engine.stream import check_block_size, check_prompt
from orthrus.errors import UserInputError

WARMUP_TOKENS = 16

OnProgress = Callable[[str, int, int], None]
"""Called with (what is running, runs done, runs in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure. `strategies` come on top of the arms "stock" and "ar", which always run.

    `warmup` rounds of all arms, 16 tokens each on the first prompt, come first and are not
    counted.
    With a temperature above 0, repeat n samples with seed + n (None counts as 0).
    """

    prompts: Sequence[BenchPrompt]
    strategies: tuple[Strategy, ...] = ("chain",)
    max_new_tokens: int = 128
    block_size: int | None = None
    temperature: float = 0.0
    seed: int | None = 0
    repeats: int = 3
    warmup: int = 1

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserInputError("there is nothing to measure; give at least one prompt.")
        for strategy in self.strategies:
            if strategy not in STRATEGIES:
                raise UserInputError(f"strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}.")
        if self.repeats < 1:
            raise UserInputError(f"repeats must be at least 1, not {self.repeats}.")
        if self.warmup < 0:
            raise UserInputError(f"warmup must be 0 or more, not {self.warmup}.")
        # Checks the remaining values, in the words of a request.
        decode_config(
            max_new_tokens=self.max_new_tokens,
            block_size=self.block_size,
            temperature=self.temperature,
            seed=self.seed,
        )

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((STOCK, "ar", *self.strategies)))


def run_bench(orthrus: Orthrus, options: BenchOptions, on_progress: OnProgress | None = None) -> BenchReport:
    """Measure the stock model's own `generate`, our plain decoding and the strategies on the same prompts.

    Raises UserInputError for a prompt or block size that does not fit the model.
    """
    prompts = [orthrus.base.encode_prompt(prompt.prompt) for prompt in options.prompts]
    for prompt_ids in prompts:
        check_prompt(prompt_ids, orthrus.base.context_length)
    check_block_size(orthrus.dual, options.block_size)
    jobs = _jobs(options, prompts)
    runs: list[Run] = []
    stock_ids: dict[int, tuple[int, ...]] = {}
    for done, job in enumerate(jobs):
        if on_progress is not None:
            on_progress(job.title, done, len(jobs))
        run, token_ids = _decode(orthrus, options, job)
        if job.warmup:
            continue
        if options.temperature == 0.0:
            # The first job of each prompt is the stock model's.
            run = replace(run, equal_to_stock=stock_ids.setdefault(job.prompt_index, token_ids) == token_ids)
        runs.append(run)
    if on_progress is not None:
        on_progress("done", len(jobs), len(jobs))
    model = orthrus.describe()
    settings = {k: getattr(options, k) for k in options.__slots__ if k != "prompts"}
    return BenchReport(
        runs=tuple(runs),
        model=model,
        options=settings | {"arms": options.arms, "num_prompts": len(prompts)},
        provenance=provenance(device=model["device"], dtype=model["dtype"], seed=options.seed),
    )


class _Job(NamedTuple):
    arm: str
    prompt_ids: list[int]
    prompt_index: int
    domain: str
    repeat: int
    max_new_tokens: int
    warmup: bool

    @property
    def title(self) -> str:
        if self.warmup:
            return f"warm-up: {self.arm}"
        return f"{self.domain}, prompt {self.prompt_index + 1}, repeat {self.repeat + 1}: {self.arm}"


def _jobs(options: BenchOptions, prompts: list[list[int]]) -> list[_Job]:
    arms = options.arms
    short = min(WARMUP_TOKENS, options.max_new_tokens)
    jobs = [_Job(arm, prompts[0], 0, "", 0, short, True) for _ in range(options.warmup) for arm in arms]
    for index, (prompt, ids) in enumerate(zip(options.prompts, prompts, strict=True)):
        for repeat in range(options.repeats):
            # Each arm has its turn at going first; the stock model in the first round, to be compared with.
            shift = repeat % len(arms)
            jobs += [
                _Job(arm, ids, index, prompt.domain, repeat, options.max_new_tokens, False)
                for arm in arms[shift:] + arms[:shift]
            ]
    return jobs


def _decode(orthrus: Orthrus, options: BenchOptions, job: _Job) -> tuple[Run, tuple[int, ...]]:
    """One run, and its tokens."""
    seed, num_prompt_tokens = (options.seed or 0) + job.repeat, len(job.prompt_ids)
    if job.arm == STOCK:
        with orthrus.stock() as model:
            stock = stock_generate(
                model,
                job.prompt_ids,
                max_new_tokens=min(job.max_new_tokens, orthrus.base.context_length - num_prompt_tokens),
                eos_token_ids=orthrus.base.eos_token_ids,
                temperature=options.temperature,
                seed=seed,
            )
        run = run_of_stock(job.prompt_index, job.domain, job.repeat, num_prompt_tokens, stock)
        return run, stock.token_ids
    config = decode_config(
        max_new_tokens=job.max_new_tokens,
        strategy=cast(Strategy, job.arm),
        block_size=options.block_size,
        temperature=options.temperature,
        seed=seed,
    )
    ours = orthrus.stream_ids(job.prompt_ids, config).drain()
    return run_of_stats(job.arm, job.prompt_index, job.domain, job.repeat, ours.stats), ours.token_ids
