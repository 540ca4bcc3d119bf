"""Lays out the numbers of a benchmark: one table of domains x arms, a summary, and the details."""

from collections.abc import Callable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from orthrus.base.markdown import markdown_table
from orthrus.bench.legend import LEGEND
from orthrus.bench.machine import NOT_AVAILABLE
from orthrus.bench.metrics import ALL, Row, Summary
from orthrus.bench.records import by_temperature
from orthrus.bench.statistics import Interval, Spread


def sampling_name(temperature: float) -> str:
    """What reports call the sampling at a temperature."""
    return f"temperature {temperature:g}" if temperature else "greedy"


def terminal(title: str, rows: Sequence[Row], summaries: Sequence[Summary]) -> RenderableType:
    """Rich tables that fit 80 columns, then the formulas of what they show."""
    parts: list[RenderableType] = [escape(title)]
    for temperature, mine, lines in _parts(rows, summaries):
        table = _table(sampling_name(temperature), ("arm", *_MAIN))
        for domain in _domains(mine):
            # The domain gets a line of its own, because a further column would not fit.
            table.add_section()
            table.add_row(f"[bold]{escape(domain)}[/bold]")
            for row in (r for r in mine if r.domain == domain):
                table.add_row(f" {row.arm}", *(_METRICS[name](row) for name in _MAIN))
        summary = _table(f"{sampling_name(temperature)}, over domains", ("arm", *_SUMMARY))
        for line in lines:
            summary.add_row(line.arm, *(show(line) for show in _SUMMARY.values()))
        times = _table(f"{sampling_name(temperature)}, times over all prompts", ("arm", *_TIMES))
        for row in (r for r in mine if r.domain == ALL):
            times.add_row(row.arm, *(_METRICS[name](row) for name in _TIMES))
        parts += [table, summary, times]
    legend = [f"[dim]{name}: {escape(LEGEND[name])}[/dim]" for name in (*_MAIN, *_SUMMARY, *_TIMES)]
    return Group(*parts, *legend)


def markdown(rows: Sequence[Row], summaries: Sequence[Summary]) -> str:
    """The same for GitHub, with every number over all domains beside its formula."""
    sections = []
    for temperature, mine, lines in _parts(rows, summaries):
        overall = [row for row in mine if row.domain == ALL]
        body = [
            [row.domain, row.arm, *(_METRICS[name](row) for name in _MAIN)]
            for domain in _domains(mine)
            for row in mine
            if row.domain == domain
        ]
        details = [[f"`{name}`", *map(show, overall), LEGEND[name]] for name, show in _METRICS.items()]
        sections += [
            f"### {sampling_name(temperature).capitalize()}",
            markdown_table(["domain", "arm", *map(_code, _MAIN)], body, "ll" + "r" * len(_MAIN)),
            "Over domains:",
            markdown_table(
                ["arm", *map(_code, _SUMMARY)],
                [[line.arm, *(show(line) for show in _SUMMARY.values())] for line in lines],
                "lrrl",
            ),
            "\n".join(f"- `{name}`: {LEGEND[name]}" for name in _SUMMARY),
            "Over all prompts:",
            markdown_table(
                ["metric", *(row.arm for row in overall), "formula"], details, "l" + "r" * len(overall)
            ),
        ]
    return "\n\n".join(sections) + "\n"


def _parts(
    rows: Sequence[Row], summaries: Sequence[Summary]
) -> Iterator[tuple[float, list[Row], list[Summary]]]:
    """(temperature, its rows, its summaries)."""
    for temperature, part in by_temperature(rows):
        yield temperature, part, [line for line in summaries if line.temperature == temperature]


def _domains(rows: Sequence[Row]) -> list[str]:
    """The whole set comes last, as a sum would."""
    return sorted(dict.fromkeys(row.domain for row in rows), key=lambda domain: domain == ALL)


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for name in names:
        # Names break at their underscores.
        table.add_column(name.replace("_", "\n"), justify="left" if name == "arm" else "right", no_wrap=True)
    return table


def _code(name: str) -> str:
    return f"`{name}`"


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}..{spread.high:.{digits}f})"


def interval_text(found: Interval) -> str:
    """The value, and its interval in brackets where it has one."""
    if found.low is None or found.high is None:
        return f"{found.value:.2f}"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _amount(value: float | None, unit: float) -> str:
    return NOT_AVAILABLE if value is None else f"{value / unit:.4g}"


def _rates(rates: Sequence[float]) -> str:
    return " ".join(f"{rate:.2f}" for rate in rates) or "–"


def _equality(row: Row) -> str:
    return "–" if row.equal_to_plain is None else "{}/{}".format(*row.equal_to_plain)


def _drafts(row: Row) -> str:
    return f"{row.acceptance_rate:.1%}" if row.accepted_histogram else "–"


_METRICS: dict[str, Callable[[Row], str]] = {
    "tokens_per_cycle_mean": lambda row: f"{row.tokens_per_cycle_mean:.2f}",
    "tokens_per_cycle_pooled": lambda row: f"{row.tokens_per_cycle_pooled:.2f}",
    "tokens_per_cycle_histogram": lambda row: " ".join(map(str, row.tokens_per_cycle_histogram)) or "–",
    "tokens_per_forward_mean": lambda row: f"{row.tokens_per_forward_mean:.2f}",
    "tokens_per_forward_pooled": lambda row: f"{row.tokens_per_forward_pooled:.2f}",
    "rows_per_pass": lambda row: f"{row.rows_per_pass:.1f}",
    "speedup_vs_stock": lambda row: interval_text(row.speedup_vs_stock),
    "speedup_vs_ar": lambda row: interval_text(row.speedup_vs_ar),
    "equal_to_plain": _equality,
    "tokens_per_second": lambda row: _spread(row.tokens_per_second, 1),
    "ttft_ms": lambda row: _spread(row.ttft_ms, 0),
    "tpot_ms": lambda row: _spread(row.tpot_ms, 1),
    "acceptance_rate": _drafts,
    "accepted_per_cycle": lambda row: f"{row.accepted_per_cycle:.2f}" if row.accepted_histogram else "–",
    "accepted_histogram": lambda row: " ".join(map(str, row.accepted_histogram)) or "–",
    "acceptance_by_position": lambda row: _rates(row.acceptance_by_position),
    "peak_bytes": lambda row: _amount(row.peak_bytes, 1),
    "flops_per_token": lambda row: _amount(row.flops_per_token, 1),
    "bytes_per_token": lambda row: _amount(row.bytes_per_token, 1),
    "joules_per_token": lambda row: _amount(row.joules_per_token, 1),
    "tokens": lambda row: str(row.tokens),
    "passes": lambda row: str(row.passes),
    "cycles": lambda row: str(row.cycles),
}
_SUMMARY: dict[str, Callable[[Summary], str]] = {
    "speedup_vs_stock_geomean": lambda line: interval_text(line.speedup_vs_stock_geomean),
    "speedup_vs_ar_geomean": lambda line: interval_text(line.speedup_vs_ar_geomean),
    "worst_domain": lambda line: "{} {:.2f}".format(*line.worst_domain),
}
_MAIN = (
    "tokens_per_cycle_mean",
    "tokens_per_forward_mean",
    "rows_per_pass",
    "speedup_vs_stock",
    "speedup_vs_ar",
    "equal_to_plain",
)
_TIMES = ("tokens_per_second", "ttft_ms", "tpot_ms", "acceptance_rate")
SHOWN = (*_MAIN, "accepted_per_cycle", "acceptance_rate", "tokens_per_second", "ttft_ms", "tpot_ms")
"""The numbers of a row that a page shows."""


def cells(row: Row) -> list[str]:
    """Those of `SHOWN`, as text."""
    return [_METRICS[name](row) for name in SHOWN]
