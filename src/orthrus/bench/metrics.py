"""From single runs to the numbers of a report; every number has its formula in `LEGEND`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from orthrus.bench.arms import PLAIN, STOCK
from orthrus.bench.records import Run, by_temperature
from orthrus.bench.statistics import Interval, Spread, geometric_mean
from orthrus.bench.work import Sizes, Work

ALL = "all"


@dataclass(frozen=True, slots=True)
class Row:
    """One arm on one domain ("all" for the whole set) at one temperature; `LEGEND` defines every field."""

    arm: str
    domain: str
    temperature: float
    prompts: int
    tokens: int
    passes: int
    cycles: int
    tokens_per_cycle_mean: float
    tokens_per_cycle_pooled: float
    tokens_per_cycle_histogram: tuple[int, ...]
    tokens_per_forward_mean: float
    tokens_per_forward_pooled: float
    rows_per_pass: float
    acceptance_rate: float
    accepted_per_cycle: float
    accepted_histogram: tuple[int, ...]
    acceptance_by_position: tuple[float, ...]
    ttft_ms: Spread
    tpot_ms: Spread
    tokens_per_second: Spread
    speedup_vs_stock: Interval
    speedup_vs_ar: Interval
    equal_to_plain: tuple[int, int] | None
    peak_bytes: int | None
    flops_per_token: float | None
    bytes_per_token: float | None
    joules_per_token: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Summary:
    """One arm over all domains, each domain counting as much as any other; `LEGEND` defines every field.

    `worst_domain`: its name and its speed-up against the stock model.
    """

    arm: str
    temperature: float
    speedup_vs_stock_geomean: Interval
    speedup_vs_ar_geomean: Interval
    worst_domain: tuple[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rows(runs: Sequence[Run], sizes: Sizes | None = None) -> list[Row]:
    """By temperature: a row per arm for the whole set, then, of several domains, one per arm and domain."""
    domains = list(dict.fromkeys(run.domain for run in runs))
    return [
        _row(arm, domain, temperature, [run for run in part if domain in (ALL, run.domain)], sizes)
        for temperature, part in by_temperature(runs)
        for domain in (ALL, *(domains if len(domains) > 1 else ()))
        for arm in dict.fromkeys(run.arm for run in runs)
    ]


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """By temperature: a line per arm of ours over all domains."""
    found = []
    for temperature, part in by_temperature(runs):
        by_domain: dict[str, list[Run]] = {}
        for run in part:
            by_domain.setdefault(run.domain, []).append(run)
        for arm in (a for a in dict.fromkeys(run.arm for run in part) if a != STOCK):
            ratios = {domain: speedups(mine, STOCK, arm) for domain, mine in by_domain.items()}
            values = {domain: geometric_mean([mine]) for domain, mine in ratios.items()}
            worst = min(values, key=lambda domain: values[domain])
            to_ar = [speedups(mine, PLAIN, arm) for mine in by_domain.values()]
            found.append(
                Summary(
                    arm=arm,
                    temperature=temperature,
                    speedup_vs_stock_geomean=Interval.geometric_mean(list(ratios.values())),
                    speedup_vs_ar_geomean=Interval.geometric_mean(to_ar),
                    worst_domain=(worst, values[worst]),
                )
            )
    return found


def speedups(runs: Sequence[Run], slow: str, fast: str) -> list[float]:
    """By prompt: the ratio of times per token, paired by repeat; what slowed the machine then hit both arms."""
    times: dict[tuple[str, int, int], float] = {
        (run.arm, run.prompt_index, run.repeat): run.total_ms / run.num_tokens
        for run in runs
        if run.arm in (slow, fast) and run.num_tokens
    }
    ratios: dict[int, list[float]] = {}
    for (arm, prompt, repeat), ms in times.items():
        other = times.get((slow, prompt, repeat))
        if arm == fast and ms and other:
            ratios.setdefault(prompt, []).append(other / ms)
    return [median(values) for values in ratios.values()]


def acceptance_by_position(runs: Iterable[Run]) -> tuple[float, ...]:
    """Conditional rates by position, from 1; ends before the first position that no cycle reached."""
    cycles = [pair for run in runs for pair in zip(run.judged, run.accepted, strict=True)]
    rates = []
    for position in range(1, max((judged for judged, _ in cycles), default=0) + 1):
        reached = [a for judged, a in cycles if a >= position - 1 and judged >= position]
        if not reached:
            break
        rates.append(sum(a >= position for a in reached) / len(reached))
    return tuple(rates)


def _row(arm: str, domain: str, temperature: float, runs: Sequence[Run], sizes: Sizes | None) -> Row:
    mine = [run for run in runs if run.arm == arm]
    repeats = [[run for run in mine if run.repeat == n] for n in sorted({run.repeat for run in mine})]
    drafted, cycles = sum(r.num_drafted for r in mine), sum(r.num_cycles for r in mine)
    histogram = _added(r.accepted_histogram for r in mine)
    accepted = sum(r.num_accepted for r in mine)
    work = [r.work for r in mine if r.work is not None]
    after_first = sum(r.num_tokens - 1 for r in mine)
    is_known = sizes is not None and len(work) == len(mine) and after_first > 0
    total = Work.sum(work)
    peaks = [r.peak_bytes for r in mine if r.peak_bytes is not None]
    joules = [r.joules for r in mine if r.joules is not None]
    return Row(
        arm=arm,
        domain=domain,
        temperature=temperature,
        prompts=len({r.prompt_index for r in mine}),
        tokens=sum(r.num_tokens for r in mine),
        passes=sum(r.num_passes for r in mine),
        cycles=cycles,
        # A run that ended with its first token has no cycle, hence no mean of its own.
        tokens_per_cycle_mean=_mean([(r.num_tokens - 1) / r.num_cycles for r in mine if r.num_cycles]),
        tokens_per_cycle_pooled=_ratio(after_first, cycles),
        tokens_per_cycle_histogram=_histogram(n for r in mine for n in r.committed),
        tokens_per_forward_mean=_mean([r.num_tokens / r.num_passes for r in mine]),
        tokens_per_forward_pooled=_ratio(sum(r.num_tokens for r in mine), sum(r.num_passes for r in mine)),
        rows_per_pass=_ratio(
            sum(r.num_rows for r in mine), sum(r.num_passes - r.num_prefill_passes for r in mine)
        ),
        acceptance_rate=_ratio(accepted, drafted),
        accepted_per_cycle=_ratio(accepted, sum(histogram)),
        accepted_histogram=histogram,
        acceptance_by_position=acceptance_by_position(mine),
        ttft_ms=Spread.of(r.ttft_ms for r in mine),
        tpot_ms=Spread.of(
            _ratio(sum(r.decode_ms for r in part), sum(r.num_tokens - 1 for r in part)) for part in repeats
        ),
        tokens_per_second=Spread.of(
            _ratio(1e3 * sum(r.num_tokens for r in part), sum(r.total_ms for r in part)) for part in repeats
        ),
        speedup_vs_stock=Interval.geometric_mean([speedups(runs, STOCK, arm)]),
        speedup_vs_ar=Interval.geometric_mean([speedups(runs, PLAIN, arm)]),
        equal_to_plain=_equal(mine),
        peak_bytes=max(peaks) if peaks else None,
        flops_per_token=sizes.flops(total) / after_first if sizes and is_known else None,
        bytes_per_token=sizes.bytes(total) / after_first if sizes and is_known else None,
        joules_per_token=sum(joules) / sum(r.num_tokens for r in mine)
        if joules and len(joules) == len(mine)
        else None,
    )


def _equal(runs: Sequence[Run]) -> tuple[int, int] | None:
    if any(run.equal_to_plain is None for run in runs):
        return None
    prompts = {run.prompt_index for run in runs}
    return len(prompts - {run.prompt_index for run in runs if not run.equal_to_plain}), len(prompts)


def _added(histograms: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return _listed(sum((Counter(dict(enumerate(h))) for h in histograms), Counter[int]()))


def _histogram(values: Iterable[int]) -> tuple[int, ...]:
    return _listed(Counter(values))


def _listed(total: Counter[int]) -> tuple[int, ...]:
    return tuple(total[n] for n in range(max(total) + 1)) if total else ()


def _mean(values: list[float]) -> float:
    return fmean(values) if values else 0.0


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
