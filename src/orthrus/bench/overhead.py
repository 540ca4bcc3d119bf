"""What Orthrus costs beyond the model itself: cycles against their passes, memory, first token, rows."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch

from orthrus.api import Orthrus
from orthrus.base.provenance import provenance
from orthrus.bench.metrics import Spread
from orthrus.config import DecodeConfig, SamplingParams
from orthrus.engine.cycles import chain_cycle, prefill_chunk
from orthrus.engine.probe import synchronize, watch_caches
from orthrus.engine.state import DecodeState
from orthrus.model.passes import Pass, draft_block, verify_chain
from orthrus.model.slot_cache import head_dim, num_kv_heads

BLOCK_SIZES = (8, 32)
ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
CYCLE_TARGET, TTFT_TARGET = 1.10, 1.02

LEGEND = {
    "cycle_over_passes": "time of a whole chain cycle / (draft pass + verify pass of the same rows, each run "
    "alone from a ready-made pass), side by side in each repeat; median (min..max) over repeats",
    "extra_kv_bytes": "bytes of keys and values of a chain request's cache - an ar request's; expected: "
    "2 x layers x kv heads x head size x K x bytes per number",
    "ttft_chain_over_ar": "time to first token of chain / of ar, side by side in each repeat; median "
    "(min..max) over repeats",
    "pass_cost": "time of a pass of n AR rows, all projected / of one row; medians of interleaved repeats",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One measurement against its target. `spread` is None for what is counted, not timed."""

    name: str
    value: float
    target: float
    passed: bool
    spread: Spread | None = None


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
        lines = ["| check | value | target | verdict |", "| --- | --- | --- | --- |"]
        for check in self.checks:
            low_high = f" ({check.spread.low:.3f}..{check.spread.high:.3f})" if check.spread else ""
            value = f"{check.value:.3f}" if check.spread else f"{check.value:.0f}"
            target = f"<= {check.target}" if check.spread else f"= {check.target:.0f}"
            verdict = "PASS" if check.passed else "FAIL"
            lines.append(f"| {check.name} | {value}{low_high} | {target} | {verdict} |")
        lines += ["", "| rows | ms | relative |", "| --- | --- | --- |"]
        lines += [f"| {rows} | {ms:.1f} | {relative:.2f} |" for rows, ms, relative in self.pass_costs]
        return "\n".join([*lines, "", *(f"- `{name}`: {text}" for name, text in LEGEND.items())]) + "\n"


def measure_overhead(
    orthrus: Orthrus, options: OverheadOptions | None = None, on_progress: Callable[[str], None] | None = None
) -> OverheadReport:
    """Run all measurements. The text does not matter to them, so an untrained view does as well as any."""
    options = options or OverheadOptions()
    report = on_progress or (lambda _: None)
    checks: list[Check] = []
    for block_size in options.block_sizes:
        with _block_size(orthrus, block_size):
            report(f"cycle, K = {block_size}")
            checks.append(_cycle(orthrus, options, block_size))
            report(f"memory, K = {block_size}")
            checks.append(_memory(orthrus, options, block_size))
    report("time to first token")
    checks.append(_first_token(orthrus, options))
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


def _cycle(orthrus: Orthrus, options: OverheadOptions, block_size: int) -> Check:
    state = _filled(orthrus, options, head_room=block_size + 1)
    dual, cache = orthrus.dual, state.cache
    anchor_11, lengths = state.anchor_11, cache.lengths.copy()
    draft = draft_block(anchor_11, lengths, block_size, dual.mask_token_id, floor=True)
    verify = verify_chain(anchor_11.expand(1, block_size - 1).clone(), [lengths[0] + 1])

    def run(p: Pass) -> Callable[[], object]:
        return lambda: dual.run(p, cache)

    def cycle() -> object:
        return chain_cycle(state, room=block_size + 1)

    ratios = []
    for repeat in range(options.warmup + options.repeats):
        times = {}
        # The cycle goes first in every other repeat.
        for part in ("passes", "cycle") if repeat % 2 else ("cycle", "passes"):
            if part == "cycle":
                times[part] = _time(dual.device, cycle)
                state.anchor_11 = anchor_11
            else:
                times[part] = _time(dual.device, run(draft))
                cache.commit(1)
                times[part] += _time(dual.device, run(verify))
            cache.roll_back(cache.lengths[0] - lengths[0])
        ratios.append(times["cycle"] / times["passes"])
    spread = Spread.of(ratios[options.warmup :])
    passed = spread.median <= CYCLE_TARGET
    return Check(f"cycle_over_passes, K = {block_size}", spread.median, CYCLE_TARGET, passed, spread)


def _memory(orthrus: Orthrus, options: OverheadOptions, block_size: int) -> Check:
    sizes = []
    for strategy in ("chain", "ar"):
        config = DecodeConfig(max_new_tokens=block_size, strategy=strategy, ignore_eos=True)
        with watch_caches(orthrus.dual) as caches:
            orthrus.stream_ids(_prompt(orthrus, options.history), config).drain()
        sizes.append(caches[0].num_bytes)
    c = orthrus.dual.base.config
    expected = (
        2 * c.num_hidden_layers * num_kv_heads(c) * head_dim(c) * block_size * orthrus.dual.dtype.itemsize
    )
    extra = sizes[0] - sizes[1]
    return Check(f"extra_kv_bytes, K = {block_size}", extra, expected, extra == expected)


def _first_token(orthrus: Orthrus, options: OverheadOptions) -> Check:
    prompt_ids = _prompt(orthrus, options.history)

    def first(strategy: str) -> float:
        config = DecodeConfig(max_new_tokens=64, strategy=strategy, ignore_eos=True)  # type: ignore[arg-type]
        return next(orthrus.stream_ids(prompt_ids, config)).elapsed_ms

    ratios = []
    for repeat in range(options.warmup + options.repeats):
        order = ("chain", "ar") if repeat % 2 else ("ar", "chain")
        times = {strategy: first(strategy) for strategy in order}
        ratios.append(times["chain"] / times["ar"])
    spread = Spread.of(ratios[options.warmup :])
    return Check("ttft_chain_over_ar", spread.median, TTFT_TARGET, spread.median <= TTFT_TARGET, spread)


def _pass_costs(orthrus: Orthrus, options: OverheadOptions) -> tuple[tuple[int, float, float], ...]:
    state = _filled(orthrus, options, head_room=max(options.row_counts))
    lengths = state.cache.lengths
    passes = {n: verify_chain(state.anchor_11.expand(1, n).clone(), lengths) for n in options.row_counts}
    times: dict[int, list[float]] = {n: [] for n in passes}
    for _ in range(options.warmup + options.repeats):
        for n, p in passes.items():
            times[n].append(_time(orthrus.dual.device, lambda p=p: orthrus.dual.run(p, state.cache)))  # type: ignore[misc]
    costs = {n: median(measured[options.warmup :]) for n, measured in times.items()}
    one_row = costs[min(costs)]
    return tuple((n, ms, ms / one_row) for n, ms in costs.items())


def _filled(orthrus: Orthrus, options: OverheadOptions, head_room: int) -> DecodeState:
    """A request right after its prefill."""
    dual = orthrus.dual
    with torch.inference_mode():
        cache = dual.new_cache(options.history + head_room)
        anchor_11 = torch.zeros((1, 1), dtype=torch.long, device=dual.device)
    state = DecodeState(
        dual=dual,
        cache=cache,
        sampling=SamplingParams(),
        generator=torch.Generator(device=dual.device),
        block_size=dual.config.block_size,
        floor=True,
        context_length=orthrus.base.context_length,
        anchor_11=anchor_11,
    )
    prefill_chunk(state, _prompt(orthrus, options.history), last=True)
    return state


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
