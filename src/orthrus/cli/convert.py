"""`orthrus convert`: writes a view, or base and view together, and checks that nothing was lost."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orthrus.cli import options
from orthrus.cli.common import load_orthrus
from orthrus.cli.render import out, print_json
from orthrus.errors import CheckpointError, UserInputError

if TYPE_CHECKING:
    from torch import Tensor

    from orthrus.api import Orthrus

Layout = Literal["view", "merged", "released"]
Encoding = Literal["full", "delta4"]
PROBE = "The quick brown fox jumps over the lazy dog."


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A base (gets an untrained view), a view folder, or a merged or released checkpoint."
        ),
    ],
    out_folder: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")
    ] = None,
    named_model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="SOURCE",
            help="Name of the source, instead of the argument SOURCE.",
            rich_help_panel=options.MODEL_PANEL,
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Layout,
        typer.Option(
            help="view: only the view, like an adapter. merged: base and view, any family. "
            "released: the layout of the published Orthrus-Qwen3 models."
        ),
    ] = "view",
    block_size: Annotated[
        int | None,
        typer.Option("--block-size", "-k", help="Block size K of an untrained view. Default: 8."),
    ] = None,
    view: Annotated[
        str | None,
        typer.Option(
            help="Put this view on SOURCE: 'untrained', a folder or a hub id. Default: its own, or an untrained one."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Default: for a view float32, which keeps every bit of it; for base and view together auto, "
            "the weights as stored.",
            show_default=False,
        ),
    ] = None,
    encoding: Annotated[
        Encoding,
        typer.Option(
            help="full keeps the view bit for bit; delta4 stores it as 4-bit differences from the base "
            "(views only, about an eighth of the size)."
        ),
    ] = "full",
    average: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Write the mean of the view and of the one in this folder; may be repeated. The mean of "
            "several views of one run often drafts better than each of them.",
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Licence of the view for its card, such as apache-2.0.",
            show_default=False,
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Measured figures for the card: a JSON list of objects, or a result of "
            "benchmarks/acceptance.py.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help=options.DEVICE_HELP, rich_help_panel=options.MODEL_PANEL)
    ] = "cpu",
    revision: options.Revision = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Write a view folder or a merged checkpoint.

    The command reads the result back and checks it: the AR logits must equal the stock model's bit for bit.
    """
    from orthrus.base.outputs import check_absent, check_writable

    source, target = _source_and_target(source, out_folder, named_model)
    check_absent(target)
    check_writable(target.parent)
    if encoding != "full" and to != "view":
        raise UserInputError(f"--encoding {encoding} is for views only; add --to view, or leave it out.")
    stated = _stated(license, figures)
    orthrus = load_orthrus(
        source,
        quiet=quiet,
        view=view or _default_view(source),
        dtype=dtype or ("float32" if to == "view" else "auto"),
        runner="eager",
        device=device,
        revision=revision,
    )
    if block_size is not None:
        _set_block_size(orthrus, block_size)
    if average:
        from orthrus.model.checkpoint import average_view

        average_view(orthrus.dual, average)
    config = orthrus.dual.config
    orthrus.dual.config = replace(config, provenance=config.provenance | stated)
    logits_TV = _stock_logits(orthrus)
    _require_equal(logits_TV, _ar_logits(orthrus), "the model with its twins")
    report = _report(orthrus, target, to)
    _write(orthrus, target, to, encoding)
    wanted_dtype = str(report["dtype"])
    if to == "view":
        _check_view(orthrus, target, encoding)
    else:
        # Only one of the two models is in memory at a time.
        del orthrus
        written = load_orthrus(str(target), quiet=quiet, dtype=wanted_dtype, device=device, runner="eager")
        _require_equal(logits_TV, _ar_logits(written), str(target))
    if json:
        print_json(report)
    else:
        _print(report)


def _source_and_target(first: str, second: Path | None, named_model: str | None) -> tuple[str, Path]:
    """The source and the folder: from SOURCE OUT, or from --model and OUT alone."""
    if named_model is not None:
        if second is not None:
            options.one_model(first, named_model)
        return named_model, Path(first)
    if second is None:
        raise UserInputError("convert needs the model and the folder to write: orthrus convert SOURCE OUT.")
    return first, second


def _stated(licence: str | None, figures: Path | None) -> dict[str, Any]:
    """The user's entries for the view's provenance, checked before anything is loaded."""
    from orthrus.model.figures import read_figures

    if licence is not None and not licence.strip():
        raise UserInputError("--license is empty; name a licence such as apache-2.0, or leave it out.")
    stated = {"license": licence, "figures": None if figures is None else read_figures(figures)}
    return {key: value for key, value in stated.items() if value is not None}


def _default_view(source: str) -> str:
    """The default of --view: "untrained" for a local base, so that no warning is printed, otherwise "default"."""
    from orthrus.model.merged import folder_kind

    try:
        path = Path(source).expanduser()
        is_base = path.is_file() or ((path / "config.json").is_file() and folder_kind(path) == "base")
    except (RuntimeError, OSError, ValueError):
        # The source is no valid path. The loader has the better message.
        return "default"
    return "untrained" if is_base else "default"


def _set_block_size(orthrus: "Orthrus", block_size: int) -> None:
    config = orthrus.dual.config
    if block_size == config.block_size:
        return
    if config.trained:
        raise UserInputError(
            f"this view was trained with block size {config.block_size}, which cannot be changed; "
            "leave out --block-size, or add --view untrained."
        )
    if not 2 <= block_size < orthrus.base.context_length:
        raise UserInputError(
            f"the block size must be at least 2 and below the context of {orthrus.base.context_length}, "
            f"not {block_size}."
        )
    orthrus.dual.config = replace(config, block_size=block_size)


def _write(orthrus: "Orthrus", target: Path, to: Layout, encoding: Encoding) -> None:
    from orthrus.model.checkpoint import save_view
    from orthrus.model.merged import save_merged

    if to == "view":
        save_view(orthrus.dual, target, encoding)
    else:
        save_merged(orthrus.dual, orthrus.base, target, to)


def _probe_ids(orthrus: "Orthrus") -> "Tensor":
    import torch

    ids = orthrus.base.encode_prompt(PROBE, raw=True)
    return torch.tensor([ids], device=orthrus.dual.device)


def _ar_logits(orthrus: "Orthrus") -> "Tensor":
    """(T, V) of the probe, on the CPU, every row through the AR side of the twins."""
    import torch

    with torch.inference_mode():
        logits_TV: Tensor = orthrus.dual.base(_probe_ids(orthrus)).logits[0].cpu()
    return logits_TV


def _stock_logits(orthrus: "Orthrus") -> "Tensor":
    import torch

    with torch.inference_mode():
        logits_TV: Tensor = orthrus.stock()(_probe_ids(orthrus)).logits[0].cpu()
    return logits_TV


def _require_equal(expected_TV: "Tensor", found_TV: "Tensor", where: str) -> None:
    import torch

    if expected_TV.shape != found_TV.shape or not torch.equal(expected_TV, found_TV):
        raise CheckpointError(
            f"the AR logits of {where} are not the stock model's; do not use it, and report this."
        )


def _check_view(orthrus: "Orthrus", target: Path, encoding: Encoding) -> None:
    import torch

    from orthrus.model.checkpoint import WEIGHTS_FILE, read_view_tensors, stored_tensors

    expected = stored_tensors(orthrus.dual, encoding)
    found = read_view_tensors([target / WEIGHTS_FILE])
    if expected.keys() != found.keys() or not all(torch.equal(expected[n], found[n]) for n in expected):
        raise CheckpointError(f"{target} does not hold what was written; check the disk and convert again.")


def _report(orthrus: "Orthrus", target: Path, to: Layout) -> dict[str, Any]:
    stock = orthrus.stock()
    num_base = sum(p.numel() for p in stock.parameters())
    added = orthrus.dual.num_view_parameters()
    return {
        "path": str(target),
        "layout": to,
        "base_parameters": num_base,
        "added_parameters": added,
        "added_fraction": added / (num_base + added),
        "ar_logits_unchanged": True,
        **orthrus.describe(),
    }


def _print(report: dict[str, Any]) -> None:
    out(
        f"wrote {report['path']} ({report['layout']}, {report['dtype']})\n"
        f"base              {report['model']}, {report['base_parameters']:,} parameters\n"
        f"view              {report['view']}, K = {report['block_size']}, mask: {report['mask']}\n"
        f"parameters added  {report['added_parameters']:,} "
        f"({report['added_fraction']:.1%} of base and view together)\n"
        "checked           AR logits equal the stock model's bit for bit; written files read back\n"
    )
