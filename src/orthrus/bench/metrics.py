"""From single runs to the numbers of a report; every number has its formula in `LEGEND`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, geometric_mean, median
from typing import Any

from orthrus.engine.stock import StockRun
from orthrus.types import DecodeStats

STOCK, PLAIN, ALL = "stock", "ar", "all"

LEGEND = {
    "tokens": "new tokens, end-of-sequence included, summed over prompts and repeats",
    "passes": "forward passes of the model, prefill included, both views counted",
    "cycles": "what commits tokens once after the prefill: draft and verify, one fused pass, or one AR pass",
    "tokens_per_cycle_mean": "mean over prompts and repeats of (tokens - 1) / cycles",
    "tokens_per_cycle_pooled": "sum of (tokens - 1) / sum of cycles",
    "tokens_per_forward_mean": "mean over prompts and repeats of tokens / passes",
    "tokens_per_forward_pooled": "sum of tokens / sum of passes",
    "rows_per_pass": "sum of rows of both views / sum of passes, both without the prefill",
    "acceptance_rate": "accepted drafts / proposed drafts; the AR view's own tokens in neither",
    "accepted_histogram": "how many drafting cycles accepted 0, 1, 2, ... drafts",
    "ttft_ms": "request to first token; median (min..max) over prompts and repeats",
    "tpot_ms": "sum of time after the first token / sum of (tokens - 1); median (min..max) over repeats",
    "tokens_per_second": "sum of tokens / sum of time, first token included; median (min..max) over repeats",
    "speedup_vs_stock": "time per token of the stock model's own generate / this arm's, time to first token "
    "included, same prompts, paired by repeat; median (min..max) over repeats",
    "speedup_vs_ar": "as above, against our plain decoding",
    "equal_to_plain": "prompts whose tokens equal those of plain decoding in every repeat / prompts; greedy: "
    "of the stock model, sampled: of ar with the same seed",
    "speedup_vs_stock_geomean": "geometric mean of the domains' speedup_vs_stock, repeat by repeat; median "
    "(min..max) over repeats",
    "speedup_vs_ar_geomean": "as above, of speedup_vs_ar",
    "worst_domain": "the domain with the lowest median speedup_vs_stock, and that median",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt decoded once by one arm. Times in ms. `equal_to_plain` is None for sampled stock text, which
    another random generator draws."""

    arm: str
    prompt_index: int
    domain: str
    repeat: int
    temperature: float
    num_prompt_tokens: int
    num_tokens: int
    num_passes: int
    num_prefill_passes: int
    num_rows: int
    num_cycles: int
    num_drafted: int
    num_accepted: int
    accepted_histogram: tuple[int, ...]
    ttft_ms: float
    decode_ms: float
    equal_to_plain: bool | None = None

    @property
    def total_ms(self) -> float:
        return self.ttft_ms + self.decode_ms


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the smallest and the largest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        listed = list(values)
        return cls(median(listed), min(listed), max(listed)) if listed else cls(0.0, 0.0, 0.0)


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
    tokens_per_forward_mean: float
    tokens_per_forward_pooled: float
    rows_per_pass: float
    acceptance_rate: float
    accepted_histogram: tuple[int, ...]
    ttft_ms: Spread
    tpot_ms: Spread
    tokens_per_second: Spread
    speedup_vs_stock: Spread
    speedup_vs_ar: Spread
    equal_to_plain: tuple[int, int] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Summary:
    """One arm over all domains, each domain counting as much as any other; `LEGEND` defines every field.

    `worst_domain`: its name and its median speed-up against the stock model.
    """

    arm: str
    temperature: float
    speedup_vs_stock_geomean: Spread
    speedup_vs_ar_geomean: Spread
    worst_domain: tuple[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_of_stats(
    arm: str, prompt_index: int, domain: str, repeat: int, temperature: float, stats: DecodeStats
) -> Run:
    """A run of ours."""
    return Run(
        arm=arm,
        prompt_index=prompt_index,
        domain=domain,
        repeat=repeat,
        temperature=temperature,
        num_prompt_tokens=stats.num_prompt_tokens,
        num_tokens=stats.num_tokens,
        num_passes=stats.num_passes,
        num_prefill_passes=stats.num_prefill_passes,
        num_rows=stats.num_rows,
        num_cycles=stats.num_cycles,
        num_drafted=stats.num_drafted,
        num_accepted=stats.num_accepted,
        accepted_histogram=stats.accepted_histogram,
        ttft_ms=stats.ttft_ms,
        decode_ms=stats.decode_ms,
    )


def run_of_stock(
    prompt_index: int, domain: str, repeat: int, temperature: float, num_prompt_tokens: int, run: StockRun
) -> Run:
    """A run of the stock model: its prefill gives the first token, every further pass of one row one more."""
    num_tokens = len(run.token_ids)
    return Run(
        arm=STOCK,
        prompt_index=prompt_index,
        domain=domain,
        repeat=repeat,
        temperature=temperature,
        num_prompt_tokens=num_prompt_tokens,
        num_tokens=num_tokens,
        num_passes=num_tokens,
        num_prefill_passes=1,
        num_rows=num_tokens - 1,
        num_cycles=num_tokens - 1,
        num_drafted=0,
        num_accepted=0,
        accepted_histogram=(),
        ttft_ms=run.ttft_ms,
        decode_ms=run.decode_ms,
    )


def rows(runs: Sequence[Run]) -> list[Row]:
    """By temperature: a row per arm for the whole set, then, of several domains, one per arm and domain."""
    domains = list(dict.fromkeys(run.domain for run in runs))
    return [
        _row(arm, domain, temperature, [run for run in part if domain in (ALL, run.domain)])
        for temperature, part in _by_temperature(runs)
        for domain in (ALL, *(domains if len(domains) > 1 else ()))
        for arm in dict.fromkeys(run.arm for run in runs)
    ]


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """By temperature: a line per arm of ours over all domains."""
    found = []
    for temperature, part in _by_temperature(runs):
        by_domain: dict[str, list[Run]] = {}
        for run in part:
            by_domain.setdefault(run.domain, []).append(run)
        for arm in (a for a in dict.fromkeys(run.arm for run in part) if a != STOCK):
            medians = {
                domain: Spread.of(_speedups(mine, STOCK, arm)).median for domain, mine in by_domain.items()
            }
            worst = min(medians, key=lambda domain: medians[domain])
            domains = list(by_domain.values())
            found.append(
                Summary(
                    arm=arm,
                    temperature=temperature,
                    speedup_vs_stock_geomean=_geomean_speedup(domains, STOCK, arm),
                    speedup_vs_ar_geomean=_geomean_speedup(domains, PLAIN, arm),
                    worst_domain=(worst, medians[worst]),
                )
            )
    return found


def _row(arm: str, domain: str, temperature: float, runs: Sequence[Run]) -> Row:
    mine = [run for run in runs if run.arm == arm]
    repeats = [[run for run in mine if run.repeat == n] for n in sorted({run.repeat for run in mine})]
    drafted, cycles = sum(r.num_drafted for r in mine), sum(r.num_cycles for r in mine)
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
        tokens_per_cycle_pooled=_ratio(sum(r.num_tokens - 1 for r in mine), cycles),
        tokens_per_forward_mean=_mean([r.num_tokens / r.num_passes for r in mine]),
        tokens_per_forward_pooled=_ratio(sum(r.num_tokens for r in mine), sum(r.num_passes for r in mine)),
        rows_per_pass=_ratio(
            sum(r.num_rows for r in mine), sum(r.num_passes - r.num_prefill_passes for r in mine)
        ),
        acceptance_rate=_ratio(sum(r.num_accepted for r in mine), drafted),
        accepted_histogram=_added(r.accepted_histogram for r in mine),
        ttft_ms=Spread.of(r.ttft_ms for r in mine),
        tpot_ms=Spread.of(
            _ratio(sum(r.decode_ms for r in part), sum(r.num_tokens - 1 for r in part)) for part in repeats
        ),
        tokens_per_second=Spread.of(1e3 / _ms_per_token(part) for part in repeats),
        speedup_vs_stock=Spread.of(_speedups(runs, STOCK, arm)),
        speedup_vs_ar=Spread.of(_speedups(runs, PLAIN, arm)),
        equal_to_plain=_equal(mine),
    )


def _by_temperature(runs: Sequence[Run]) -> list[tuple[float, list[Run]]]:
    return [
        (temperature, [run for run in runs if run.temperature == temperature])
        for temperature in dict.fromkeys(run.temperature for run in runs)
    ]


def _speedups(runs: Sequence[Run], slow: str, fast: str) -> list[float]:
    """Ratio of times per token, repeat by repeat: what slowed the machine down then hit both arms."""
    ratios = []
    for repeat in sorted({run.repeat for run in runs}):
        pair = [[r for r in runs if r.repeat == repeat and r.arm == arm] for arm in (slow, fast)]
        ratios.append(_ms_per_token(pair[0]) / _ms_per_token(pair[1]))
    return ratios


def _geomean_speedup(domains: Sequence[Sequence[Run]], slow: str, fast: str) -> Spread:
    by_repeat = zip(*(_speedups(runs, slow, fast) for runs in domains), strict=True)
    return Spread.of(geometric_mean(ratios) for ratios in by_repeat)


def _equal(runs: Sequence[Run]) -> tuple[int, int] | None:
    if any(run.equal_to_plain is None for run in runs):
        return None
    prompts = {run.prompt_index for run in runs}
    return len(prompts - {run.prompt_index for run in runs if not run.equal_to_plain}), len(prompts)


def _ms_per_token(runs: Sequence[Run]) -> float:
    return sum(run.total_ms for run in runs) / sum(run.num_tokens for run in runs)


def _added(histograms: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    total: Counter[int] = Counter()
    for histogram in histograms:
        total.update(dict(enumerate(histogram)))
    return tuple(total[n] for n in range(max(total) + 1)) if total else ()


def _mean(values: list[float]) -> float:
    return fmean(values) if values else 0.0


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
