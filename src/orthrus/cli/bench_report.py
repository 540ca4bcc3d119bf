"""`orthrus bench report`: makes one page of results, and pictures of its plots."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orthrus.cli.render import note
from orthrus.errors import UserInputError

if TYPE_CHECKING:
    from orthrus.bench.plots import Plot

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SECONDS = 60


def bench_report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Results of `orthrus bench` and `orthrus audit`, of benchmarks/long_context.py and sceptic.py, or a "
            "curve of training.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The page to write.", rich_help_panel="Output"),
    ] = Path("report.html"),
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also write each plot to this folder as SVG, and as PNG if Chromium is installed.",
            rich_help_panel="Output",
        ),
    ] = None,
) -> None:
    """Make one page of results: plots, tables, formulas and origins. It loads nothing from the network, and can be
    printed.

    The command recognises a file by its field `kind`: orthrus-bench, orthrus-audit, orthrus-long-context,
    orthrus-sceptic, or orthrus-training-curve (`points` of arm, targets and tokens_per_cycle).
    """
    from orthrus.base.outputs import check_writable, write_text_atomic
    from orthrus.bench.page import make_page

    if output.exists() and not _is_page(output):
        raise UserInputError(f"{output} exists already and is no page of Orthrus; name a new file.")
    for folder in filter(None, (output.parent, plots)):
        check_writable(folder)
    page = make_page(files)
    write_text_atomic(output, page.html)
    note(f"{output}: {len(page.plots)} plots")
    if plots is not None:
        for plot in page.plots:
            write_text_atomic(plots / f"{plot.key}.svg", plot.svg() + "\n")
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if browser is None:
            note("there is no Chromium here, so no PNG files are made")
            return
        for plot in page.plots:
            _draw(browser, plot, plots / f"{plot.key}.png")


def _is_page(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8") as lines:
            return "<title>Orthrus: measured</title>" in lines.read(1000)
    except (OSError, UnicodeDecodeError):
        return False


def _draw(browser: str, plot: "Plot", target: Path) -> None:
    """A plot as PNG, at twice its size."""
    from orthrus.base.outputs import replace_file
    from orthrus.bench.svg import HEIGHT, WIDTH

    with tempfile.TemporaryDirectory() as folder, replace_file(target) as temporary:
        picture, drawn = Path(folder) / "plot.svg", Path(folder) / "plot.png"
        picture.write_text(plot.svg(), encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--force-device-scale-factor=2"]
        command += [
            f"--window-size={WIDTH},{HEIGHT}",
            f"--screenshot={drawn}",
            f"--user-data-dir={folder}/profile",
        ]
        try:
            subprocess.run([*command, picture.as_uri()], check=True, capture_output=True, timeout=_SECONDS)
            temporary.write_bytes(drawn.read_bytes())
        except (OSError, subprocess.SubprocessError) as error:
            raise UserInputError(
                f"{browser} could not draw {target.name} ({error}); leave --plots out, or take the SVG files."
            ) from error
