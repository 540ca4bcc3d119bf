"""What Orthrus adds to the passes of the model: python benchmarks/overhead.py [--help]"""

import json
from pathlib import Path
from typing import Annotated

import typer

from orthrus.api import Orthrus
from orthrus.base.outputs import write_text_atomic
from orthrus.bench.overhead import OverheadOptions, measure_overhead


def main(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or 'default'.")] = "default",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of everything.")] = 21,
    history: Annotated[int, typer.Option(min=1, help="Prompt tokens in the cache.")] = 128,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print tables and a line of JSON, keep the result; exit status 1 when a target is missed."""
    orthrus = Orthrus.load(model, "untrained", dtype, device, runner="eager")
    options = OverheadOptions(repeats=repeats, history=history)
    report = measure_overhead(orthrus, options, lambda what: typer.echo(what, err=True))
    kind = report.model["device"].split(":")[0]
    path = output or Path(__file__).parent / "results" / f"overhead-{kind}.json"
    write_text_atomic(path, json.dumps(report.to_dict(), indent=2) + "\n")
    typer.echo(report.to_markdown())
    line = {check.name: round(check.value, 4) for check in report.checks}
    typer.echo(json.dumps({"passed": report.passed, **line}, separators=(",", ":")))
    raise typer.Exit(0 if report.passed else 1)


if __name__ == "__main__":
    typer.run(main)
