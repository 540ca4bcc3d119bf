"""The table of commands. Nothing here or in a command's module imports torch: bodies do, when they run."""

from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from orthrus import __version__
from orthrus.cli import (
    adapt,
    audit,
    bench,
    bench_compare,
    bench_report,
    bench_serve,
    chat,
    convert,
    demo,
    env,
    export,
    generate,
    pack,
    serve,
    synth,
    train,
    verify,
)
from orthrus.cli.common import quiet_libraries, run_command, session


class Commands(TyperGroup):
    """A command's name may have two words: `bench serve` stands beside `bench`, which takes a model there."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if " ".join(args[:2]) in self.commands:
            args = [" ".join(args[:2]), *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="orthrus",
    cls=Commands,
    help="Lossless parallel decoding: the model's own tokens, in fewer passes.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

COMMANDS: tuple[Callable[..., None], ...] = (
    generate.generate,
    chat.chat,
    serve.serve,
    demo.demo,
    bench.bench,
    bench_compare.bench_compare,
    bench_report.bench_report,
    bench_serve.bench_serve,
    audit.audit,
    verify.verify,
    synth.synth,
    pack.pack,
    train.train,
    adapt.adapt,
    convert.convert,
    export.export_vllm,
    env.env,
)


def _help(command: Callable[..., None]) -> str:
    """A command's docstring, with one line per paragraph, because the terminal breaks the lines."""
    return "\n\n".join(" ".join(part.split()) for part in cleandoc(command.__doc__ or "").split("\n\n"))


NAMES = tuple(command.__name__.replace("_", " ") for command in COMMANDS)
for name, command in zip(NAMES, COMMANDS, strict=True):
    app.command(name, help=_help(command))(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"orthrus {__version__}")
        raise typer.Exit


@app.callback()
def root(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show tracebacks and all warnings in full.")
    ] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    session.verbose = verbose


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its status, which docs/cli.md lists."""
    quiet_libraries()
    raise SystemExit(run_command(typer.main.get_command(app), args))


if __name__ == "__main__":
    main()
