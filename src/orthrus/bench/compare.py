"""Compares two benchmark reports, and lists settings in which they differ."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from orthrus.base.markdown import markdown_table
from orthrus.bench.layout import sampling_name
from orthrus.bench.metrics import Row
from orthrus.bench.report import BenchReport, read_report
from orthrus.bench.statistics import Interval, Spread

METRICS = (
    "tokens_per_second",
    "speedup_vs_stock",
    "tpot_ms",
    "ttft_ms",
    "tokens_per_cycle_mean",
    "tokens_per_forward_mean",
    "rows_per_pass",
    "acceptance_rate",
    "accepted_per_cycle",
    "flops_per_token",
    "bytes_per_token",
    "joules_per_token",
    "peak_bytes",
)
_SAME = {
    "model": ("model", "base_fingerprint", "dtype", "device", "attention"),
    "options": (
        "max_new_tokens",
        "temperatures",
        "block_size",
        "node_budget",
        "block_budget",
        "num_prompts",
        "prompts_digest",
        "seed",
    ),
    "provenance": ("cpu", "accelerator", "threads"),
}


@dataclass(frozen=True, slots=True)
class Change:
    """One metric of one arm and domain at one temperature.

    `ratio`: b / a. `clear`: whether the two spreads (for speed-ups, intervals) do not overlap; None without them.
    """

    temperature: float
    domain: str
    arm: str
    metric: str
    a: float
    b: float
    ratio: float | None
    clear: bool | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """`differences`: settings in which the runs differ. Each is a reason not to trust a ratio of times."""

    changes: tuple[Change, ...]
    differences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "orthrus-comparison"} | asdict(self)

    def to_table(self) -> RenderableType:
        table = Table(title="b against a (* where the spreads do not overlap)", title_justify="left")
        for name, letter in zip(_HEADER, _ALIGN, strict=True):
            table.add_column(name, justify="left" if letter == "l" else "right")
        for change in self.changes:
            table.add_row(*_cells(change))
        return Group(table, *(f"differs: {line}" for line in self.differences))

    def __rich__(self) -> RenderableType:
        return self.to_table()

    def to_markdown(self) -> str:
        table = markdown_table(_HEADER, map(_cells, self.changes), _ALIGN)
        return "\n".join([table, "", *(f"- differs: {line}" for line in self.differences)]).rstrip() + "\n"


def compare_reports(
    a: BenchReport | Mapping[str, Any] | Path, b: BenchReport | Mapping[str, Any] | Path
) -> Comparison:
    """Compare two reports, their `to_dict`, or JSON files of it, by temperature, domain and arm.

    Raises UserInputError for something that is no report.
    """
    a, b = _report(a), _report(b)
    rows_b = {_key(row): row for row in b.rows}
    pairs = [(row, rows_b[_key(row)]) for row in a.rows if _key(row) in rows_b]
    changes = tuple(
        _change(*pair, metric)
        for pair in pairs
        for metric in METRICS
        if None not in (getattr(pair[0], metric), getattr(pair[1], metric))
    )
    return Comparison(changes, tuple(_differences(a, b)))


def _report(given: BenchReport | Mapping[str, Any] | Path) -> BenchReport:
    if isinstance(given, Path):
        return read_report(given)
    return given if isinstance(given, BenchReport) else BenchReport.from_dict(given)


def _key(row: Row) -> tuple[float, str, str]:
    return row.temperature, row.domain, row.arm


def _change(a: Row, b: Row, metric: str) -> Change:
    values = getattr(a, metric), getattr(b, metric)
    clear = None
    if isinstance(values[0], Spread | Interval) and None not in (values[0].low, values[1].low):
        clear = values[0].high < values[1].low or values[1].high < values[0].low
    x, y = (v.value if isinstance(v, Spread | Interval) else v for v in values)
    return Change(*_key(a), metric, x, y, y / x if x else None, clear)


def _differences(a: BenchReport, b: BenchReport) -> list[str]:
    found = []
    for part, names in _SAME.items():
        for name in names:
            x, y = (getattr(report, part).get(name) for report in (a, b))
            if x != y:
                found.append(f"{name}: {x} / {y}")
    return found


_HEADER = ["sampling", "domain", "arm", "metric", "a", "b", "b / a"]
_ALIGN = "llllrrr"


def _cells(change: Change) -> list[str]:
    ratio = "–" if change.ratio is None else f"{change.ratio:.3f}{'*' if change.clear else ''}"
    where = [sampling_name(change.temperature), change.domain, change.arm, change.metric]
    return [*where, _number(change.a), _number(change.b), ratio]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.4g}"
