"""Reports of `bench` and `audit`: on the screen in the format asked for, and as JSON in a file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orthrus.base.text import printable
from orthrus.cli.options import Format
from orthrus.cli.render import out, print_json


@contextmanager
def held_output(output: Path | None) -> Iterator[None]:
    """Hold the file of a report for this process. Refuses, before any work, one that cannot be written, that is no
    report of ours, or that another process writes."""
    if output is None:
        yield
        return
    from orthrus.base.outputs import check_report, storage_errors
    from orthrus.base.owned import locked_file

    check_report(output)
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with locked_file(output, "writes"):
        yield


def save_report(report: Any, output: Path, *, indent: int | None = 2) -> None:
    """Write the JSON file, in one step; without an indent it is several times smaller and quicker to write."""
    from orthrus.base.outputs import write_text_atomic

    write_text_atomic(output, json.dumps(report.to_dict(), indent=indent, ensure_ascii=False) + "\n")


def show_report(report: Any, format_: Format, output: Path | None) -> None:
    """Write the JSON file first, so that a closed pipe cannot cost it; then print."""
    if output is not None:
        save_report(report, output)
    if format_ == "json":
        print_json(report.to_dict())
    elif format_ == "table":
        print_table(report.to_table())
    else:
        text = printable(report.to_markdown() if format_ == "md" else report.to_csv())
        out(text if text.endswith("\n") else text + "\n")


def print_table(table: Any) -> None:
    """A rich table or a string."""
    if isinstance(table, str):
        out(table if table.endswith("\n") else table + "\n")
        return
    from rich.console import Console

    Console().print(table)
