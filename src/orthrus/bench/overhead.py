"""What Orthrus costs beyond the model itself: cycles against their passes, memory, first token, rows."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from orthrus.api import Orthrus
from orthrus.base.markdown import markdown_table
from orthrus.base.provenance import provenance
from orthrus.bench.metrics import Spread
from orthrus.config import FIXED_STRATEGIES, DecodeConfig, SamplingParams, Strategy
from orthrus.engine.cycles import decode_cycle, fixed_plan
from orthrus.engine.passes import Block, commit_pass, prefill_pass
from orthrus.engine.state import DecodeState, timed_request
from orthrus.engine.stock import synchronize, watch_caches
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass, verify_chain
from orthrus.model.slot_cache import SlotCache, head_dim, num_kv_heads

BLOCK_SIZES = (8, 32)
ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
CYCLE_TARGET, TTFT_TARGET = 1.10, 1.02

# What auto costs is the business of its policy, and ar is what the others are measured against.
DRAFTING: tuple[Strategy, ...] = tuple(s for s in FIXED_STRATEGIES if s != "ar")

LEGEND = {
    "cycle_over_passes": "time of a whole cycle / its passes alone, ready-made, each with the rows that the "
    "cycle projects to the vocabulary: two passes for chain and tree, one for fused and fused_tree; side by "
    "side in each repeat; median (min..max) over repeats",
    "extra_kv_bytes": "bytes of keys and values of a request's cache - an ar request's; expected: 2 x layers "
    "x kv heads x head size x bytes per number x slots; slots: K for chain, max(K, node budget) for tree, K "
    "- 1 + block budget x K for fused, node budget + block budget x K for fused_tree; exact where text and "
    "head-room fit into the first step of a growing cache",
    "ttft_over_ar": "time to first token / that of ar, side by side in each repeat; median (min..max) over "
    "repeats",
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
        lines = []
        for check in self.checks:
            low_high = f" ({check.spread.low:.3f}..{check.spread.high:.3f})" if check.spread else ""
            value = f"{check.value:.3f}" if check.spread else f"{check.value:.0f}"
            target = f"<= {check.target}" if check.spread else f"= {check.target:.0f}"
            lines.append([check.name, f"{value}{low_high}", target, "PASS" if check.passed else "FAIL"])
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
                checks.append(_memory(orthrus, options, strategy, block_size))
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
    config = DecodeConfig(strategy=strategy)
    plan, room = fixed_plan(config, block_size), block_size + 2
    state = _filled(orthrus, options, room + 1 + _head_room(config, block_size))
    dual, cache = orthrus.dual, state.cache
    if plan.num_blocks:
        # A fused cycle finds its draft at hand: the cycle before has made it.
        commit_pass(state, blocks=[Block(0)])
    start = state.length, state.anchor_id, state.drafts

    def cycle() -> None:
        decode_cycle(state, plan, room)

    def rewind() -> None:
        cache.lengths[0], state.anchor_id, state.drafts = start

    state.dual = recorder = _Recorder(dual)  # type: ignore[assignment]
    cycle()
    state.dual = dual
    assert len(recorder.calls) == (1 if plan.num_blocks else 2), "the cycle is none of the whole ones"

    def passes() -> None:
        for call in recorder.calls:
            cache.lengths[0] = call.length
            hidden_BTC = dual.hidden(call.pass_, cache)
            for num_rows in call.projected:
                dual.head(hidden_BTC[0, :num_rows])

    ratios = []
    for repeat in range(options.warmup + options.repeats):
        times = {}
        # The cycle goes first in every other repeat.
        for part in (passes, cycle) if repeat % 2 else (cycle, passes):
            rewind()
            times[part] = _time(dual.device, part)
        ratios.append(times[cycle] / times[passes])
    spread = Spread.of(ratios[options.warmup :])
    name = f"cycle_over_passes, {strategy}, K = {block_size}"
    return Check(name, spread.median, CYCLE_TARGET, spread.median <= CYCLE_TARGET, spread)


@dataclass(slots=True)
class _Call:
    """A pass, the history it ran on, and how many rows were projected, projection by projection."""

    pass_: Pass
    length: int
    projected: list[int]


class _Recorder:
    """A view that notes the passes made through it."""

    def __init__(self, dual: DualView) -> None:
        self._dual = dual
        self.calls: list[_Call] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dual, name)

    def hidden(self, p: Pass, cache: SlotCache) -> Tensor:
        self.calls.append(_Call(p, cache.lengths[0], []))
        return self._dual.hidden(p, cache)

    def head(self, hidden_RC: Tensor, *, drafts: bool = False) -> Tensor:
        self.calls[-1].projected.append(len(hidden_RC))
        return self._dual.head(hidden_RC, drafts=drafts)


def _memory(orthrus: Orthrus, options: OverheadOptions, strategy: Strategy, block_size: int) -> Check:
    sizes = []
    for which in (strategy, "ar"):
        config = DecodeConfig(max_new_tokens=block_size, strategy=which, ignore_eos=True)
        with watch_caches(orthrus.dual) as caches:
            orthrus.stream_ids(_prompt(orthrus, options.history), config).drain()
        sizes.append(caches[0].num_bytes)
    c = orthrus.dual.base.config
    slot_bytes = 2 * c.num_hidden_layers * num_kv_heads(c) * head_dim(c) * orthrus.dual.dtype.itemsize
    expected = slot_bytes * _head_room(DecodeConfig(strategy=strategy), block_size)
    extra = sizes[0] - sizes[1]
    return Check(f"extra_kv_bytes, {strategy}, K = {block_size}", extra, expected, extra == expected)


def _head_room(config: DecodeConfig, block_size: int) -> int:
    """Slots that a request needs beyond its text, by the formula in `LEGEND`: the engine has its own."""
    blocks = config.block_budget * block_size
    return {
        "chain": block_size,
        "tree": max(block_size, config.node_budget),
        "fused": block_size - 1 + blocks,
        "fused_tree": config.node_budget + blocks,
    }[config.strategy]


def _first_token(orthrus: Orthrus, options: OverheadOptions, strategy: Strategy) -> Check:
    prompt_ids = _prompt(orthrus, options.history)

    def first(which: Strategy) -> float:
        config = DecodeConfig(max_new_tokens=64, strategy=which, ignore_eos=True)
        return next(orthrus.stream_ids(prompt_ids, config)).elapsed_ms

    ratios = []
    for repeat in range(options.warmup + options.repeats):
        order: tuple[Strategy, ...] = (strategy, "ar") if repeat % 2 else ("ar", strategy)
        times = {which: first(which) for which in order}
        ratios.append(times[strategy] / times["ar"])
    spread = Spread.of(ratios[options.warmup :])
    passed = spread.median <= TTFT_TARGET
    return Check(f"ttft_over_ar, {strategy}", spread.median, TTFT_TARGET, passed, spread)


def _pass_costs(orthrus: Orthrus, options: OverheadOptions) -> tuple[tuple[int, float, float], ...]:
    state = _filled(orthrus, options, head_room=max(options.row_counts))
    lengths, device = state.cache.lengths, orthrus.dual.device
    passes = {
        n: verify_chain(torch.full((1, n), state.anchor_id, device=device), lengths)
        for n in options.row_counts
    }
    times: dict[int, list[float]] = {n: [] for n in passes}
    for _ in range(options.warmup + options.repeats):
        for n, p in passes.items():
            times[n].append(_time(device, lambda p=p: orthrus.dual.run(p, state.cache)))  # type: ignore[misc]
    costs = {n: median(measured[options.warmup :]) for n, measured in times.items()}
    one_row = costs[min(costs)]
    return tuple((n, ms, ms / one_row) for n, ms in costs.items())


def _filled(orthrus: Orthrus, options: OverheadOptions, head_room: int) -> DecodeState:
    """A request right after its prefill."""
    with torch.inference_mode():
        cache = orthrus.dual.new_cache(options.history + head_room)
    state = timed_request(orthrus.dual, cache, SamplingParams(), orthrus.base.context_length)
    prefill_pass(state, _prompt(orthrus, options.history), last=True)
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
