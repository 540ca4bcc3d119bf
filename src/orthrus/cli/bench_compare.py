"""`orthrus bench compare`: two results side by side."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from orthrus.cli import options
from orthrus.cli.report import held_output, show_report


def bench_compare(
    a: Annotated[
        Path, typer.Argument(metavar="A.json", help="A result that `orthrus bench --output` wrote.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Another one. Ratios are B / A.")],
    format_: Annotated[
        Literal["table", "md", "json"],
        typer.Option("--format", help="What to print on stdout.", rich_help_panel="Output"),
    ] = "table",
    json: options.FormatJson = False,
    output: options.OutputFile = None,
) -> None:
    """Compare two results of `orthrus bench`, and show the differences in their settings. No model is loaded."""
    from orthrus.bench import compare_reports

    with held_output(output):
        show_report(compare_reports(a, b), "json" if json else format_, output)
