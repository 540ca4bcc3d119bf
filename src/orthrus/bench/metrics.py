"""From single runs to the numbers of a report; every number has its formula in `LEGEND`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from orthrus.engine.probe import StockRun
from orthrus.types import DecodeStats

STOCK, ALL = "stock", "all"

LEGEND = {
    "tokens": "new tokens, end-of-sequence included, summed over prompts and repeats",
    "passes": "forward passes of the model: prefill, draft and verify all count",
    "cycles": "what commits tokens once after the prefill: draft + verify, or one AR pass",
    "tokens_per_cycle_mean": "mean over prompts and repeats of (tokens - 1) / cycles",
    "tokens_per_cycle_pooled": "sum of (tokens - 1) / sum of cycles",
    "tokens_per_forward_mean": "mean over prompts and repeats of tokens / passes",
    "tokens_per_forward_pooled": "sum of tokens / sum of passes",
    "acceptance_rate": "accepted drafts / proposed drafts; the AR view's own tokens in neither",
    "accepted_histogram": "how many drafting cycles accepted 0, 1, 2, ... drafts",
    "ttft_ms": "request to first token; median (min..max) over prompts and repeats",
    "tpot_ms": "sum of time after the first token / sum of (tokens - 1); median (min..max) over repeats",
    "tokens_per_second": "sum of tokens / sum of time, first token included; median (min..max) over repeats",
    "speedup_vs_stock": "time per token of the stock model's own generate / this arm's, time to first token "
    "included, same prompts, paired by repeat; median (min..max) over repeats",
    "speedup_vs_ar": "as above, against our plain decoding",
    "equal_to_stock": "prompts whose tokens equal the stock model's in every repeat / prompts; greedy only",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt decoded once by one arm. Times in ms. `equal_to_stock` is None when sampling."""

    arm: str
    prompt_index: int
    domain: str
    repeat: int
    num_prompt_tokens: int
    num_tokens: int
    num_passes: int
    num_cycles: int
    num_drafted: int
    num_accepted: int
    accepted_histogram: tuple[int, ...]
    ttft_ms: float
    decode_ms: float
    equal_to_stock: bool | None = None

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
    """One arm on one domain ("all" for the whole set); `LEGEND` defines every field."""

    arm: str
    domain: str
    prompts: int
    tokens: int
    passes: int
    cycles: int
    tokens_per_cycle_mean: float
    tokens_per_cycle_pooled: float
    tokens_per_forward_mean: float
    tokens_per_forward_pooled: float
    acceptance_rate: float
    accepted_histogram: tuple[int, ...]
    ttft_ms: Spread
    tpot_ms: Spread
    tokens_per_second: Spread
    speedup_vs_stock: Spread
    speedup_vs_ar: Spread
    equal_to_stock: tuple[int, int] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_of_stats(arm: str, prompt_index: int, domain: str, repeat: int, stats: DecodeStats) -> Run:
    """A run of ours."""
    return Run(
        arm=arm,
        prompt_index=prompt_index,
        domain=domain,
        repeat=repeat,
        num_prompt_tokens=stats.num_prompt_tokens,
        num_tokens=stats.num_tokens,
        num_passes=stats.num_passes,
        num_cycles=stats.num_cycles,
        num_drafted=stats.num_drafted,
        num_accepted=stats.num_accepted,
        accepted_histogram=stats.accepted_histogram,
        ttft_ms=stats.ttft_ms,
        decode_ms=stats.decode_ms,
    )


def run_of_stock(prompt_index: int, domain: str, repeat: int, num_prompt_tokens: int, run: StockRun) -> Run:
    """A run of the stock model: its prefill gives the first token, every further pass one more."""
    num_tokens = len(run.token_ids)
    return Run(
        arm=STOCK,
        prompt_index=prompt_index,
        domain=domain,
        repeat=repeat,
        num_prompt_tokens=num_prompt_tokens,
        num_tokens=num_tokens,
        num_passes=num_tokens,
        num_cycles=num_tokens - 1,
        num_drafted=0,
        num_accepted=0,
        accepted_histogram=(),
        ttft_ms=run.ttft_ms,
        decode_ms=run.decode_ms,
    )


def rows(runs: Sequence[Run]) -> list[Row]:
    """A row per arm for the whole set, then one per arm and domain where there are several domains."""
    domains = list(dict.fromkeys(run.domain for run in runs))
    return [
        _row(arm, domain, [run for run in runs if domain in (ALL, run.domain)])
        for domain in (ALL, *(domains if len(domains) > 1 else ()))
        for arm in dict.fromkeys(run.arm for run in runs)
    ]


def _row(arm: str, domain: str, runs: Sequence[Run]) -> Row:
    mine = [run for run in runs if run.arm == arm]
    repeats = [[run for run in mine if run.repeat == n] for n in sorted({run.repeat for run in mine})]
    drafted, cycles = sum(r.num_drafted for r in mine), sum(r.num_cycles for r in mine)
    return Row(
        arm=arm,
        domain=domain,
        prompts=len({r.prompt_index for r in mine}),
        tokens=sum(r.num_tokens for r in mine),
        passes=sum(r.num_passes for r in mine),
        cycles=cycles,
        # A run that ended with its first token has no cycle, hence no mean of its own.
        tokens_per_cycle_mean=_mean([(r.num_tokens - 1) / r.num_cycles for r in mine if r.num_cycles]),
        tokens_per_cycle_pooled=_ratio(sum(r.num_tokens - 1 for r in mine), cycles),
        tokens_per_forward_mean=_mean([r.num_tokens / r.num_passes for r in mine]),
        tokens_per_forward_pooled=_ratio(sum(r.num_tokens for r in mine), sum(r.num_passes for r in mine)),
        acceptance_rate=_ratio(sum(r.num_accepted for r in mine), drafted),
        accepted_histogram=_added(r.accepted_histogram for r in mine),
        ttft_ms=Spread.of(r.ttft_ms for r in mine),
        tpot_ms=Spread.of(
            _ratio(sum(r.decode_ms for r in part), sum(r.num_tokens - 1 for r in part)) for part in repeats
        ),
        tokens_per_second=Spread.of(1e3 / _ms_per_token(part) for part in repeats),
        speedup_vs_stock=_speedup(runs, STOCK, arm),
        speedup_vs_ar=_speedup(runs, "ar", arm),
        equal_to_stock=_equal(mine),
    )


def _speedup(runs: Sequence[Run], slow: str, fast: str) -> Spread:
    """Ratio of times per token, paired by repeat: what slowed the machine down then hit both arms."""
    ratios = []
    for repeat in sorted({run.repeat for run in runs}):
        pair = [[r for r in runs if r.repeat == repeat and r.arm == arm] for arm in (slow, fast)]
        ratios.append(_ms_per_token(pair[0]) / _ms_per_token(pair[1]))
    return Spread.of(ratios)


def _equal(runs: Sequence[Run]) -> tuple[int, int] | None:
    if any(run.equal_to_stock is None for run in runs):
        return None
    prompts = {run.prompt_index for run in runs}
    return len(prompts - {run.prompt_index for run in runs if not run.equal_to_stock}), len(prompts)


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
