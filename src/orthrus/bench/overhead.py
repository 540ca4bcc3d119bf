"""What Orthrus costs beyond the model itself: cycles against their passes, first token, rows."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch

from orthrus.api import Orthrus
from orthrus.base.devices import synchronize
from orthrus.base.markdown import markdown_table
from orthrus.base.provenance import provenance
from orthrus.bench.cycles import RecordingRunner, ready_request, step_cycle, whole_passes, without_reuse
from orthrus.bench.statistics import Spread
from orthrus.config import FIXED_STRATEGIES, DecodeConfig, Strategy
from orthrus.engine.beside import EngineBeside
from orthrus.model.passes import causal, join
from orthrus.model.pool import PAGE, Slots, pages_for

BLOCK_SIZES = (8, 32)
ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
CYCLE_TARGET, TTFT_TARGET = 1.10, 1.02

# What auto costs is the business of its policy, and ar is what the others are measured against.
DRAFTING: tuple[Strategy, ...] = tuple(s for s in FIXED_STRATEGIES if s != "ar")

LEGEND = {
    "cycle_over_passes": "time of a whole cycle in the engine / its passes alone, ready-made, each with the "
    "rows that the cycle projects to the vocabulary: two passes for chain and tree, one for fused and "
    "fused_tree; one after the other in each repeat; median (min..max) over repeats",
    "kv_pages": f"not measured: a request takes whole pages of {PAGE} slots, for its text and for the rows of "
    "the pass in flight, whatever the strategy; a slot takes 2 x layers x kv heads x head size x bytes per "
    "number",
    "ttft_over_ar": "time to first token / that of ar, side by side in each repeat; median (min..max) over "
    "repeats",
    "pass_cost": "time of a pass of n AR rows, all projected / of one row; medians of interleaved repeats",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One measurement against its target: value is the median of spread."""

    name: str
    value: float
    target: float
    passed: bool
    spread: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class OverheadOptions:
    """Sizes of the measurement; `history` is the number of prompt tokens in the cache."""

    block_sizes: tuple[int, ...] = BLOCK_SIZES
    row_counts: tuple[int, ...] = ROW_COUNTS
    history: int = 128
    repeats: int = 21
    warmup: int = 3


@dataclass(frozen=True, slots=True)
class OverheadReport:
    """`pass_costs`: (rows, ms, ms relative to one row)."""

    checks: tuple[Check, ...]
    pass_costs: tuple[tuple[int, float, float], ...]
    model: dict[str, Any]
    options: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "orthrus-overhead", "passed": self.passed, "legend": LEGEND} | asdict(self)

    def to_markdown(self) -> str:
        """The checks, the cost of a pass, and what each number means."""
        lines = []
        for check in self.checks:
            value = f"{check.value:.3f} ({check.spread.low:.3f}..{check.spread.high:.3f})"
            lines.append([check.name, value, f"<= {check.target}", "PASS" if check.passed else "FAIL"])
        costs = [[str(rows), f"{ms:.1f}", f"{relative:.2f}"] for rows, ms, relative in self.pass_costs]
        parts = [
            markdown_table(["check", "value", "target", "verdict"], lines),
            markdown_table(["rows", "ms", "relative"], costs, "rrr"),
            "\n".join(f"- `{name}`: {text}" for name, text in LEGEND.items()),
        ]
        return "\n\n".join(parts) + "\n"


def measure_overhead(
    orthrus: Orthrus, options: OverheadOptions | None = None, on_progress: Callable[[str], None] | None = None
) -> OverheadReport:
    """Run all measurements. The text does not matter to them, so an untrained view does as well as any."""
    options = options or OverheadOptions()
    report = on_progress or (lambda _: None)
    checks: list[Check] = []
    for block_size in options.block_sizes:
        with _block_size(orthrus, block_size):
            for strategy in DRAFTING:
                report(f"{strategy}, K = {block_size}")
                checks.append(_cycle(orthrus, options, strategy, block_size))
    for strategy in DRAFTING:
        report(f"{strategy}, time to first token")
        checks.append(_first_token(orthrus, options, strategy))
    report("cost of a pass by rows")
    costs = _pass_costs(orthrus, options)
    about = orthrus.describe()
    return OverheadReport(
        checks=tuple(checks),
        pass_costs=costs,
        model=about,
        options=asdict(options),
        provenance=provenance(device=about["device"], dtype=about["dtype"], seed=None),
    )


def _cycle(orthrus: Orthrus, options: OverheadOptions, strategy: Strategy, block_size: int) -> Check:
    runner = RecordingRunner(orthrus.engine.runner)
    engine = EngineBeside(orthrus.engine, runner)
    prompt_ids, device = _prompt(orthrus, options.history), orthrus.dual.device
    ratios = []
    for _ in range(options.warmup + options.repeats):
        request = ready_request(engine, prompt_ids, strategy)
        runner.calls.clear()
        cycle_ms = _time(device, lambda request=request: step_cycle(engine, request))  # type: ignore[misc]
        assert len(runner.calls) == whole_passes(strategy), "the cycle is none of the whole ones"
        ratios.append(cycle_ms / _time(device, lambda: runner.replay(engine.scheduler.pool)))
        engine.drop(request)
    name = f"cycle_over_passes, {strategy}, K = {block_size}"
    return _check(name, ratios[options.warmup :], CYCLE_TARGET)


def _first_token(orthrus: Orthrus, options: OverheadOptions, strategy: Strategy) -> Check:
    prompt_ids = _prompt(orthrus, options.history)
    fresh = without_reuse(orthrus)

    def first(which: Strategy) -> float:
        stream = fresh.stream_ids(
            prompt_ids, DecodeConfig(max_new_tokens=64, strategy=which, ignore_eos=True)
        )
        elapsed_ms = next(stream).elapsed_ms
        stream.close()
        return elapsed_ms

    ratios = []
    for repeat in range(options.warmup + options.repeats):
        order: tuple[Strategy, ...] = (strategy, "ar") if repeat % 2 else ("ar", strategy)
        times = {which: first(which) for which in order}
        ratios.append(times[strategy] / times["ar"])
    return _check(f"ttft_over_ar, {strategy}", ratios[options.warmup :], TTFT_TARGET)


def _check(name: str, ratios: list[float], target: float) -> Check:
    spread = Spread.of(ratios)
    return Check(name, spread.median, target, spread.median <= target, spread)


def _pass_costs(orthrus: Orthrus, options: OverheadOptions) -> tuple[tuple[int, float, float], ...]:
    runner, device = orthrus.engine.runner, orthrus.dual.device
    most = options.history + max(options.row_counts)
    pool = runner.new_pool(pages_for(most))
    slots = Slots(pool)
    slots.reserve(most)
    ids = _prompt(orthrus, most)
    with torch.inference_mode():
        runner.hidden(join([(causal(ids[: options.history]), slots)], device), pool)
    slots.commit(options.history)
    passes = {n: join([(causal(ids[:n]), slots)], device) for n in options.row_counts}
    times: dict[int, list[float]] = {n: [] for n in passes}
    for _ in range(options.warmup + options.repeats):
        for n, p in passes.items():
            times[n].append(_time(device, lambda p=p: runner.head(runner.hidden(p, pool))))  # type: ignore[misc]
    costs = {n: median(measured[options.warmup :]) for n, measured in times.items()}
    one_row = costs[min(costs)]
    return tuple((n, ms, ms / one_row) for n, ms in costs.items())


def _prompt(orthrus: Orthrus, length: int) -> list[int]:
    """Some ids; which ones makes no difference to the time of a pass."""
    vocab_size = int(orthrus.dual.base.config.vocab_size)
    return random.Random(0).choices(range(vocab_size), k=length)


@contextmanager
def _block_size(orthrus: Orthrus, block_size: int) -> Iterator[None]:
    """Pretend that the view was trained for this size: times do not depend on what the drafts are worth."""
    before = orthrus.dual.config
    orthrus.dual.config = replace(before, block_size=block_size)
    try:
        yield
    finally:
        orthrus.dual.config = before


def _time(device: torch.device, call: Callable[[], object]) -> float:
    """Milliseconds of one call, the device idle before and after."""
    synchronize(device)
    start = perf_counter()
    with torch.inference_mode():
        call()
    synchronize(device)
    return (perf_counter() - start) * 1e3
