"""The report of a benchmark: complete as JSON, readable as a table, Markdown or CSV."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from orthrus.bench.metrics import ALL, LEGEND, Row, Run, Spread, rows
from orthrus.errors import UserInputError

KIND = "orthrus-bench"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class BenchReport:
    """Single runs, and what they were made with. `rows` are the numbers, `LEGEND` their formulas."""

    runs: tuple[Run, ...]
    model: dict[str, Any]
    options: dict[str, Any]
    provenance: dict[str, Any]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(rows(self.runs))

    @property
    def overall(self) -> tuple[Row, ...]:
        """One row per arm, over all domains."""
        return tuple(row for row in self.rows if row.domain == ALL)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and complete: rows, single runs, formulas, model, options and provenance."""
        return {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "options": self.options,
            "provenance": self.provenance,
            "legend": LEGEND,
            "rows": [row.to_dict() for row in self.rows],
            "runs": [asdict(run) for run in self.runs],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "BenchReport":
        """The report behind `to_dict`; UserInputError when it is none, or of another format."""
        if raw.get("kind") != KIND or raw.get("format_version") != FORMAT_VERSION:
            raise UserInputError("no benchmark report of this release; make one with `orthrus bench`.")
        try:
            names = {field.name for field in fields(Run)}
            records: list[dict[str, Any]] = [
                {k: tuple(v) if isinstance(v, list) else v for k, v in run.items() if k in names}
                for run in raw["runs"]
            ]
            return cls(
                tuple(Run(**record) for record in records),
                dict(raw["model"]),
                dict(raw["options"]),
                dict(raw["provenance"]),
            )
        except (KeyError, TypeError, AttributeError) as e:
            raise UserInputError(f"the benchmark report is damaged ({e}); make it again.") from e

    def to_table(self) -> RenderableType:
        """For a terminal: metrics by arm with their formulas, then the domains side by side."""
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD)
        table.add_column("metric", min_width=max(map(len, _METRICS)))
        for row in self.overall:
            table.add_column(row.arm, justify="right")
        for name, show in _METRICS.items():
            table.add_row(name, *(show(row) for row in self.overall))
        legend = [f"[dim]{name}: {escape(LEGEND[name])}[/dim]" for name in _METRICS]
        if len(self.rows) == len(self.overall):
            return Group(table, *legend)
        # Names break at their underscores, so that the columns fit a terminal of 80.
        domains = Table(
            title="By domain", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
        )
        for name in ("domain", "arm", *_BRIEF):
            left = name in ("domain", "arm")
            domains.add_column(name.replace("_", "\n"), justify="left" if left else "right")
        for row in self.rows:
            if row.domain != ALL:
                domains.add_row(row.domain, row.arm, *(_METRICS[name](row) for name in _BRIEF))
        return Group(table, *legend, domains)

    def to_markdown(self) -> str:
        """GitHub tables: all arms over all domains with the formulas, then the domains."""
        lines = [f"**{self.title}**", "", f"`{self.provenance.get('command', '')}`", ""]
        lines += _markdown(
            ["metric", *(row.arm for row in self.overall), "formula"],
            [
                [f"`{name}`", *(show(row) for row in self.overall), LEGEND[name]]
                for name, show in _METRICS.items()
            ],
        )
        if len(self.rows) > len(self.overall):
            body = [
                [row.domain, row.arm, *(_METRICS[name](row) for name in _BRIEF)]
                for row in self.rows
                if row.domain != ALL
            ]
            lines += ["", *_markdown(["domain", "arm", *(f"`{name}`" for name in _BRIEF)], body)]
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """One line per arm and domain, spreads as three columns."""
        out = io.StringIO()
        lines = [_flat(row) for row in self.rows]
        writer = csv.DictWriter(out, fieldnames=list(lines[0]) if lines else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return out.getvalue()

    @property
    def title(self) -> str:
        """Model, view and settings in one line."""
        m, o = self.model, self.options
        law = "greedy" if not o["temperature"] else f"temperature {o['temperature']:g}"
        block = o["block_size"] or m["block_size"]
        return (
            f"{m['model']}, {m['dtype']} on {m['device']}, {m['view']} view, block {block}, {law}, "
            f"prompts: {o['num_prompts']}, repeats: {o['repeats']}, tokens: at most {o['max_new_tokens']}"
        )


def read_report(path: Path) -> BenchReport:
    """The report in a JSON file; UserInputError naming the file when it is unreadable or something else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserInputError(
            f"cannot read {path} as a benchmark report; give the JSON that `orthrus bench` wrote."
        ) from e
    if not isinstance(raw, dict):
        raise UserInputError(f"{path} is no benchmark report; make one with `orthrus bench`.")
    try:
        return BenchReport.from_dict(raw)
    except UserInputError as e:
        raise UserInputError(f"{path}: {e}") from e


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}..{spread.high:.{digits}f})"


def _equality(row: Row) -> str:
    return "–" if row.equal_to_stock is None else "{} of {}".format(*row.equal_to_stock)


def _drafts(row: Row) -> str:
    return f"{row.acceptance_rate:.1%}" if row.accepted_histogram else "–"


_METRICS: dict[str, Callable[[Row], str]] = {
    "speedup_vs_stock": lambda row: _spread(row.speedup_vs_stock, 2),
    "speedup_vs_ar": lambda row: _spread(row.speedup_vs_ar, 2),
    "tokens_per_second": lambda row: _spread(row.tokens_per_second, 1),
    "tokens_per_cycle_mean": lambda row: f"{row.tokens_per_cycle_mean:.2f}",
    "tokens_per_cycle_pooled": lambda row: f"{row.tokens_per_cycle_pooled:.2f}",
    "tokens_per_forward_mean": lambda row: f"{row.tokens_per_forward_mean:.2f}",
    "tokens_per_forward_pooled": lambda row: f"{row.tokens_per_forward_pooled:.2f}",
    "acceptance_rate": _drafts,
    "accepted_histogram": lambda row: " ".join(map(str, row.accepted_histogram)) or "–",
    "ttft_ms": lambda row: _spread(row.ttft_ms, 0),
    "tpot_ms": lambda row: _spread(row.tpot_ms, 1),
    "equal_to_stock": _equality,
    "tokens": lambda row: str(row.tokens),
    "passes": lambda row: str(row.passes),
    "cycles": lambda row: str(row.cycles),
}
_BRIEF = (
    "speedup_vs_stock",
    "tokens_per_second",
    "tokens_per_cycle_mean",
    "tokens_per_forward_mean",
    "acceptance_rate",
    "equal_to_stock",
)


def _markdown(header: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *body)]


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.to_dict().items():
        if isinstance(value, dict):
            flat |= {f"{name}_{part}": f"{number:.4f}" for part, number in value.items()}
        elif isinstance(value, tuple):
            flat[name] = " ".join(map(str, value))
        else:
            flat[name] = f"{value:.4f}" if isinstance(value, float) else value
    return flat
