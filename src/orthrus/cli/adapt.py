"""`orthrus adapt`: re-tune a view on logged requests, and keep the new one only where it drafts better."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from orthrus.base.paths import expanded
from orthrus.cli import options
from orthrus.cli.adapt_run import Adapting, check_log, start_folder
from orthrus.cli.render import out, print_json
from orthrus.errors import UserInputError


def adapt(
    log: Annotated[
        Path | None,
        typer.Argument(
            help="JSONL with messages, prompt or turns (of which the first is asked) on each line.",
            show_default=False,
        ),
    ] = None,
    view: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="The view to re-tune in place; the old one is kept beside it. Created if it does not exist.",
        ),
    ] = Path("view"),
    rollback: Annotated[bool, typer.Option("--rollback", help="Restore the previous view.")] = False,
    model: Annotated[
        str, typer.Option(help=options.MODEL_HELP, rich_help_panel=options.MODEL_PANEL)
    ] = "default",
    init: Annotated[
        str, typer.Option(help="If FOLDER does not exist: the view folder to start from, or 'default'.")
    ] = "default",
    held_back: Annotated[
        float, typer.Option(help="Share of the requests that are held back to judge the new view.")
    ] = 0.2,
    epochs: Annotated[float, typer.Option(help="Passes over the other requests.")] = 3.0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            "-n",
            min=1,
            help="Maximum number of tokens in the base's answer to a request without one.",
        ),
    ] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the split and of training.")] = 0,
    dtype: Annotated[str, typer.Option(help="dtype of the frozen base: float32 or bfloat16.")] = "float32",
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Re-tune a view on logged requests.

    A share of the requests is held back to judge the new view. The new view is kept only if real decodes of these
    requests improve, and those of built-in prompts get at most 2 % worse. The same command resumes a stopped run.
    """
    view = _full_path(view)
    if rollback:
        if log is not None:
            raise UserInputError("--rollback takes no log; give one of them.")
        _roll_back(view, json=json)
        return
    if log is None:
        raise UserInputError("give the log to learn from, or --rollback.")
    if not 0 < held_back < 1:
        raise UserInputError(f"held-back must lie between 0 and 1, not {held_back}.")
    # A bad line is found before torch is loaded.
    check_log(log)
    from orthrus.training.adapt import GENERAL_PROMPTS
    from orthrus.training.recipe import TrainConfig

    # A wrong setting costs no work.
    config = TrainConfig(
        base=model,
        init_view=str(start_folder(view, init)),
        num_anchors=96,
        sequence_length=576,
        drop_long=True,
        first_target=1,
        batch_size=1,
        epochs=epochs,
        learning_rate=learning_rate,
        min_lr_ratio=0.05,
        dtype=dtype,  # type: ignore[arg-type]
        seed=seed,
        save_every=40,
        evaluate_prompts=0,
        trackers=(),
    )
    settings = {"held_back": held_back, "max_new_tokens": max_new_tokens, "general": GENERAL_PROMPTS}
    report = Adapting(log, view, init, config, settings, quiet=quiet).run()
    if json:
        print_json(report)
    else:
        _print(report)


def _roll_back(view: Path, *, json: bool) -> None:
    from orthrus.base.owned import locked_file
    from orthrus.training.replaced_views import roll_back

    if not view.parent.is_dir():
        raise UserInputError(f"there is no folder {view.parent}; name the view that was adapted with --view.")
    with locked_file(view, "adapts"):
        source, aside = roll_back(view)
    report = {"view": str(view), "from": str(source), "aside": None if aside is None else str(aside)}
    if json:
        print_json(report)
    else:
        out(f"{view} is again what lay in {source}; the one that was there is {aside or 'nowhere'}\n")


def _full_path(view: Path) -> Path:
    """The view's folder by its own name, also for "." and "..", because its neighbours are named after it."""
    found = Path(os.path.abspath(expanded(view)))
    if not found.name:
        raise UserInputError(f"{found} cannot be replaced by a view; name a folder in it.")
    return found


def _print(report: dict[str, Any]) -> None:
    verb = "kept" if report["kept"] else "not kept, and nothing was changed"
    lines = [f"the new view is {verb}: {report['reason']}"]
    for name, words in (("held_back", "held-back requests"), ("general", "general set")):
        figures = report["tokens_per_cycle"][name]
        lines.append(f"  {words:<20} {figures['old']:.2f} -> {figures['new']:.2f} tokens per cycle")
    if report["kept"]:
        old = f"{report['old_view']} holds the old one"
        undo = "; --rollback restores it" if report["replaced"] else ""
        lines.append(f"{report['view']} holds the new view, {old}{undo}")
    out("\n".join(lines) + "\n")
