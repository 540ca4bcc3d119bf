"""The report of a benchmark: complete as JSON, and as tables, Markdown or CSV to read."""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from orthrus.base.json_text import parse_json
from orthrus.bench.layout import markdown, sampling_name, terminal
from orthrus.bench.legend import LEGEND
from orthrus.bench.metrics import ALL, Row, Summary, rows, summaries
from orthrus.bench.records import Run
from orthrus.bench.work import Sizes
from orthrus.errors import UserInputError

KIND = "orthrus-bench"
FORMAT_VERSION = 3
# Version 2 had no records of single cycles. They are empty then.
_READABLE = (2, FORMAT_VERSION)


@dataclass(frozen=True)
class BenchReport:
    """Single runs, with their model, options and provenance.

    `rows` and `summaries` are the numbers, and `LEGEND` has their formulas. `is_complete`: False during the run, and
    for a run that was stopped.
    """

    runs: tuple[Run, ...]
    model: dict[str, Any]
    options: dict[str, Any]
    provenance: dict[str, Any]
    is_complete: bool = True

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(rows(self.runs, self.sizes))

    @cached_property
    def summaries(self) -> tuple[Summary, ...]:
        return tuple(summaries(self.runs))

    @property
    def sizes(self) -> Sizes | None:
        """The model's sizes, for the costs of rows and passes; None if unknown."""
        raw = self.model.get("sizes")
        return None if raw is None else Sizes(**raw)

    @property
    def overall(self) -> tuple[Row, ...]:
        """One row per temperature and arm, over all domains."""
        return tuple(row for row in self.rows if row.domain == ALL)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and complete: rows, summaries, single runs, formulas, model, options and provenance.

        During a run, rows and summaries are left out, because they follow from the runs and cost time.
        """
        return {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "is_complete": self.is_complete,
            "model": self.model,
            "options": self.options,
            "provenance": self.provenance,
            "legend": LEGEND,
            "rows": [row.to_dict() for row in (self.rows if self.is_complete else ())],
            "summaries": [line.to_dict() for line in (self.summaries if self.is_complete else ())],
            "runs": [asdict(run) for run in self.runs],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "BenchReport":
        """The inverse of `to_dict`. Raises UserInputError for another content or format."""
        if raw.get("kind") != KIND or raw.get("format_version") not in _READABLE:
            raise UserInputError("no benchmark report of this release; make one with `orthrus bench`.")
        try:
            report = cls(
                tuple(map(Run.from_dict, raw["runs"])),
                dict(raw["model"]),
                dict(raw["options"]),
                dict(raw["provenance"]),
                bool(raw.get("is_complete", True)),
            )
            # Raises if a setting is missing.
            _ = report.title
            return report
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserInputError(f"the benchmark report is damaged ({e}); make it again.") from e

    def to_table(self) -> RenderableType:
        """For a terminal of 80 columns: domains x arms, the summary and times, for each temperature."""
        return terminal(self.title, self.rows, self.summaries)

    def to_markdown(self) -> str:
        """GitHub tables: domains x arms, the summary, and all numbers over all prompts by formula."""
        head = f"**{self.title}**\n\n`{self.provenance.get('command', '')}`\n\n"
        return head + markdown(self.rows, self.summaries)

    def to_csv(self) -> str:
        """One line per temperature, domain and arm, with spreads in three columns."""
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
        samplings = " and ".join(map(sampling_name, o["temperatures"]))
        block = o["block_size"] or m["block_size"]
        return (
            f"{m['model']}, {m['dtype']} on {m['device']}, {m['view']} view, block {block}, {samplings}, "
            f"prompts: {o['num_prompts']}, repeats: {o['repeats']}, tokens: at most {o['max_new_tokens']}"
        )


def read_report(path: Path) -> BenchReport:
    """The report in a JSON file. Raises UserInputError, with the file, if it is unreadable or no report."""
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserInputError(
            f"{path} cannot be read ({e.strerror}); give the JSON file that `orthrus bench` wrote."
        ) from e
    except ValueError as e:
        raise UserInputError(f"{path} is not JSON; give the JSON file that `orthrus bench` wrote.") from e
    if not isinstance(raw, dict):
        raise UserInputError(f"{path} is no benchmark report; make one with `orthrus bench`.")
    try:
        return BenchReport.from_dict(raw)
    except UserInputError as e:
        raise UserInputError(f"{path}: {e}") from e


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.to_dict().items():
        if isinstance(value, dict):
            flat |= {f"{name}_{part}": _decimals(number) for part, number in value.items()}
        elif isinstance(value, tuple):
            flat[name] = " ".join(map(str, value))
        else:
            flat[name] = _decimals(value)
    return flat


def _decimals(value: Any) -> Any:
    """Floats with four decimals; other values unchanged."""
    return f"{value:.4f}" if isinstance(value, float) else value
