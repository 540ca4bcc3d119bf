"""Runs every arm on every prompt, interleaved, so that a drift of the machine affects all arms alike."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from orthrus.api import Orthrus
from orthrus.base.bench_prompts import BenchPrompt
from orthrus.base.provenance import provenance
from orthrus.bench.arms import PLAIN, STOCK, Arm, check_rounds
from orthrus.bench.cycles import RecordingRunner, without_reuse
from orthrus.bench.layout import sampling_name
from orthrus.bench.machine import Energy, forget_peak, peak_bytes
from orthrus.bench.records import About, Run, output_digest, run_of_result, run_of_stock
from orthrus.bench.report import BenchReport
from orthrus.bench.work import sizes_of, work_of, work_of_stock
from orthrus.config import DecodeConfig
from orthrus.engine.limits import check_block_size, check_prompt
from orthrus.engine.stock import stock_generate
from orthrus.errors import UserInputError

WARMUP_TOKENS = 16
_DEFAULTS = DecodeConfig()
# Two parts of one run must agree in these. Their start times may differ.
_SAME_MACHINE = ("git_commit", "versions", "python", "cpu", "accelerator", "threads", "device", "dtype")

OnProgress = Callable[[str, int, int], None]
"""Called with (what is running, runs done, runs in all)."""
OnPart = Callable[[BenchReport], None]
"""Called with the report so far, after each prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure.

    strategies: run in addition to the arms "stock" and "ar". Each is a name, or a name with settings (`Arm.parse`).
    warmup: rounds of all arms, 16 tokens each on the first prompt, which come first and are not counted. temperatures:
    each gives numbers of its own. Above 0, repeat n samples with seed + n (None counts as 0). thinking: the value of a
    chat template's switch for thinking aloud; None leaves it to the template.
    """

    prompts: Sequence[BenchPrompt]
    strategies: tuple[str, ...] = ("chain",)
    temperatures: tuple[float, ...] = (0.0,)
    max_new_tokens: int = 128
    block_size: int | None = None
    node_budget: int = _DEFAULTS.node_budget
    block_budget: int = _DEFAULTS.block_budget
    seed: int | None = 0
    repeats: int = 3
    warmup: int = 1
    thinking: bool | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserInputError("there is nothing to measure; give at least one prompt.")
        if not self.temperatures:
            raise UserInputError("there is nothing to measure; give at least one temperature.")
        check_rounds(self.repeats, self.warmup, strategies=self.strategies, temperatures=self.temperatures)
        # Checks the remaining values, in the words of a request.
        for name in self.strategies:
            for temperature in self.temperatures:
                self.config(name, temperature, self.seed, self.max_new_tokens)

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((STOCK, PLAIN, *self.strategies)))

    def config(self, arm: str, temperature: float, seed: int | None, max_new_tokens: int) -> DecodeConfig:
        """The request of one run of ours."""
        common = {name: getattr(self, name) for name in ("block_size", "node_budget", "block_budget")}
        return Arm.parse(arm).config(common, temperature, seed, max_new_tokens)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with a digest for the prompts."""
        settings = {k: getattr(self, k) for k in self.__slots__ if k != "prompts"}
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        return settings | {
            "arms": list(self.arms),
            "num_prompts": len(self.prompts),
            "prompts_digest": prompts_digest(self.prompts),
        }


def run_bench(
    orthrus: Orthrus,
    options: BenchOptions,
    on_progress: OnProgress | None = None,
    *,
    on_part: OnPart | None = None,
    begun: BenchReport | None = None,
    energy: Energy | None = None,
) -> BenchReport:
    """Measure the stock model's own `generate`, our plain decoding and the strategies on the same prompts.

    No arm keeps a prompt's history for its next run. No other thread may decode meanwhile.

    begun: the last report that a stopped run gave to `on_part`; its runs are not repeated. energy: counts joules if the
    machine has counters; by default the report has no energy.

    Raises UserInputError for a prompt or block size that does not fit the model, and for a `begun` of other
    settings, another model or another machine.
    """
    recorder = RecordingRunner(orthrus.engine.runner)
    bench = _Bench(without_reuse(orthrus, recorder), recorder, options, energy)
    values = None if options.thinking is None else {"enable_thinking": options.thinking}
    prompts = [orthrus.base.encode_prompt(p.prompt, template_values=values) for p in options.prompts]
    for prompt_ids in prompts:
        check_prompt(prompt_ids, orthrus.base.context_length)
    for arm in options.arms[1:]:
        config = options.config(arm, options.temperatures[0], options.seed, options.max_new_tokens)
        check_block_size(orthrus.dual, config.block_size)
    about = bench.about()
    if begun is not None:
        _check_same(begun, about)
        resumed = [*begun.provenance.get("resumed", []), about.provenance["time"]]
        about = replace(about, provenance=begun.provenance | {"resumed": resumed})
    runs = list(begun.runs) if begun is not None else []
    have = {(run.temperature, run.prompt_index, run.repeat, run.arm) for run in runs}
    jobs = _jobs(options, prompts)
    left = [job for job in jobs if job.warmup or job.key not in have]
    if all(job.warmup for job in left):
        left = []
    for number, job in enumerate(left):
        if on_progress is not None:
            on_progress(job.title, len(jobs) - len(left) + number, len(jobs))
        run = bench.decode(job)
        if not job.warmup:
            runs.append(run)
            following = left[number + 1] if number + 1 < len(left) else None
            if on_part is not None and following and following.prompt_index != job.prompt_index:
                on_part(replace(about, runs=tuple(runs), is_complete=False))
    if on_progress is not None:
        on_progress("done", len(jobs), len(jobs))
    outputs = {(run.temperature, run.prompt_index, run.repeat, run.arm): run.output for run in runs}
    finished = tuple(replace(run, equal_to_plain=_equal_to_plain(run, outputs)) for run in runs)
    return replace(about, runs=finished)


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
    def key(self) -> tuple[float, int, int, str]:
        return self.temperature, self.prompt_index, self.repeat, self.arm

    @property
    def title(self) -> str:
        if self.warmup:
            return f"warm-up: {self.arm}"
        where = f"{self.domain}, prompt {self.prompt_index + 1}, repeat {self.repeat + 1}"
        return f"{where}, {sampling_name(self.temperature)}: {self.arm}"


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
            # Each arm goes first in turn.
            shift = (index * options.repeats + repeat) % len(arms)
            jobs += [
                _Job(arm, ids, index, prompt.domain, repeat, temperature, options.max_new_tokens, False)
                for temperature in options.temperatures
                for arm in arms[shift:] + arms[:shift]
            ]
    return jobs


class _Bench:
    """The common state of all runs."""

    def __init__(
        self, orthrus: Orthrus, recorder: RecordingRunner, options: BenchOptions, energy: Energy | None
    ) -> None:
        self.orthrus, self.recorder, self.options, self.energy = orthrus, recorder, options, energy

    def about(self) -> BenchReport:
        """A report without runs."""
        model = self.orthrus.describe()
        sizes = sizes_of(self.orthrus.dual, self.orthrus.engine.runner.kv_dtype)
        made = provenance(device=model["device"], dtype=model["dtype"], seed=self.options.seed)
        if self.energy is not None:
            made["energy"] = self.energy.describe()
        model["sizes"] = None if sizes is None else sizes.to_dict()
        return BenchReport((), model, self.options.to_dict(), made)

    def decode(self, job: _Job) -> Run:
        """One run."""
        device, options = self.orthrus.dual.device, self.options
        seed, num_prompt_tokens = (options.seed or 0) + job.repeat, len(job.prompt_ids)
        forget_peak(device)
        if self.energy is not None:
            self.energy.start()
        if job.arm == STOCK:
            stock = stock_generate(
                self.orthrus.stock(),
                job.prompt_ids,
                max_new_tokens=min(job.max_new_tokens, self.orthrus.base.context_length - num_prompt_tokens),
                eos_token_ids=self.orthrus.base.eos_token_ids,
                temperature=job.temperature,
                seed=seed,
            )
            about = self._around(job, stock.token_ids)
            return run_of_stock(
                about, num_prompt_tokens, stock, work_of_stock(num_prompt_tokens, len(stock.token_ids))
            )
        config = options.config(job.arm, job.temperature, seed, job.max_new_tokens)
        self.recorder.calls.clear()
        stream = self.orthrus.stream_ids(job.prompt_ids, config)
        # The first record is the prefill's. Work before it is not decoding.
        next(stream)
        first = len(self.recorder.calls)
        result = stream.drain()
        about = self._around(job, result.token_ids)
        return run_of_result(job.arm, about, result, work_of(self.recorder.calls[first:]))

    def _around(self, job: _Job, token_ids: Sequence[int]) -> About:
        joules = None if self.energy is None else self.energy.stop()
        peak, output = peak_bytes(self.orthrus.dual.device), output_digest(token_ids)
        return About(job.prompt_index, job.domain, job.repeat, job.temperature, peak, joules, output)


def _check_same(begun: BenchReport, now: BenchReport) -> None:
    """Raises UserInputError if a run cannot continue a stopped one."""
    for name, mine, theirs in (
        ("options", now.options, begun.options),
        ("model", now.model, begun.model),
        ("machine", _machine(now), _machine(begun)),
    ):
        if mine != theirs:
            changed = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
            raise UserInputError(
                f"the unfinished run has another {name} ({', '.join(changed)}); run it as it was begun, or name a "
                "new file."
            )


def _machine(report: BenchReport) -> dict[str, Any]:
    return {name: report.provenance.get(name) for name in _SAME_MACHINE}


def _equal_to_plain(run: Run, outputs: dict[tuple[float, int, int, str], str]) -> bool | None:
    """Greedy text against the stock model's first; sampled text against that of ar with the same seed."""
    key = run.temperature, run.prompt_index
    if run.temperature == 0.0:
        plain = outputs[*key, 0, STOCK]
    elif run.arm == STOCK:
        return None
    else:
        plain = outputs[*key, run.repeat, PLAIN]
    return run.output == plain
