"""`orthrus train`: trains a view with a recipe and a corpus, or plans the run."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthrus.cli import options
from orthrus.cli.common import cancel_on_interrupt
from orthrus.cli.progress import ProgressDisplay
from orthrus.cli.render import note, out, print_json
from orthrus.cli.train_panel import TrainDisplay
from orthrus.cli.train_plan import PlanOptions, print_plan

if TYPE_CHECKING:
    from orthrus.model.dual_view import DualView
    from orthrus.training.packs import Pack, Packs
    from orthrus.training.recipe import TrainConfig
    from orthrus.training.run_folder import RunFolder
    from orthrus.training.run_state import RunState
    from orthrus.training.trainer import Hooks, TrainLog
    from orthrus.training.view_score import Scorer

_PLAN = "Planning"


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file such as recipes/smollm2-cpu.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings that override the recipe's.", show_default=False
        ),
    ] = None,
    named_model: options.NamedBase = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Train nothing; compute the memory, operations and time that the recipe needs.",
            rich_help_panel=_PLAN,
        ),
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs of the run, one process each.", rich_help_panel=_PLAN)
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="a100, h100, h200, b200, l40s or rtx4090: sets memory and peak. Default: h100.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Memory of each GPU.", rich_help_panel=_PLAN)
    ] = None,
    peak_tflops: Annotated[
        float | None,
        typer.Option(help="Peak TFLOP/s of each GPU in the recipe's dtype.", rich_help_panel=_PLAN),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(help="Share of the peak that the run reaches. Default: 0.4.", rich_help_panel=_PLAN),
    ] = None,
    corpus_tokens: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Tokens of the corpus, prompts included, if it does not exist yet.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Train a diffusion view, or plan it.

    The same command resumes where an earlier one stopped. Ctrl-C and SIGTERM save first. OUTPUT/best holds the
    view with the best evaluation score, OUTPUT/view the last view.
    """
    asked = PlanOptions(
        gpus=gpus,
        gpu=gpu,
        gpu_memory=gpu_memory,
        peak_tflops=peak_tflops,
        utilisation=utilisation,
        corpus_tokens=corpus_tokens,
    )
    if named_model is not None:
        overrides = [*(overrides or []), f"base={named_model}"]
    if not plan:
        asked.refuse_alone()
        _train(recipe, overrides, quiet=quiet, json=json)
        return
    from orthrus.training.recipe_file import load_recipe

    print_plan(load_recipe(recipe, overrides), asked, quiet=quiet, json=json)


def _train(recipe: Path, overrides: list[str] | None, *, quiet: bool, json: bool) -> None:
    from orthrus.training.recipe_file import load_recipe
    from orthrus.training.run_folder import check_run_folder, run_folder

    # Cheap checks come before the model, and before torch, are loaded.
    config = load_recipe(recipe, overrides)
    # Under torchrun, only the first process writes.
    first = os.environ.get("RANK", "0") == "0"
    if first:
        check_run_folder(config.output_folder)
    from orthrus.training.packs import packed_corpora
    from orthrus.training.trackers import wanted

    wanted(config.trackers)
    with ProgressDisplay(quiet=quiet or not first) as on_progress:
        sequences = packed_corpora(
            config.corpus, config.sequence_length, drop_long=config.drop_long, on_progress=on_progress
        )
    from orthrus.training.trainer import train as run_training

    run = _Run(config, sequences, quiet=quiet)
    with run_folder(config.output_folder, is_main=run.is_main) as held:
        run.begin(held)
        with run.display, cancel_on_interrupt(run, on_kill=True) as interrupt:
            state = run_training(run.dual, sequences, config, sequences.digest, run.hooks(), held)
            run.finish(state)
    if run.is_main:
        report = run.report(state)
        if json:
            print_json(report)
        else:
            _print(report)
    if state.step < run.num_steps:
        if run.is_main:
            note(f"stopped after step {state.step}; the same command goes on from there")
        raise typer.Exit(interrupt.status)


class _Run:
    """One invocation: the model with its view, and the callbacks of the trainer."""

    def __init__(self, config: "TrainConfig", sequences: "Packs", *, quiet: bool) -> None:
        from orthrus.model.loading import check_base_name, load_frozen
        from orthrus.training.flex_blocks import check_attention
        from orthrus.training.processes import loading_device, this_process
        from orthrus.training.speed import dtype_advice, matmul_peak
        from orthrus.training.start import check_packs, starting_view, warn_of_other_models
        from orthrus.training.trainer import steps_of
        from orthrus.training.view_score import held_out_prompts

        process = this_process()
        self.is_main: bool = process.is_main_process
        check_attention(config.attention, process.device)
        check_base_name(config.base)
        quiet = quiet or not self.is_main
        with ProgressDisplay(quiet=quiet) as on_progress:
            base = load_frozen(
                config.base, dtype=config.dtype, device=loading_device(config), on_progress=on_progress
            ).base
            check_packs(base, sequences)
            self.dual: DualView = starting_view(base, config)
        if self.is_main:
            warn_of_other_models(self.dual, sequences)
        self.config, self.output = config, config.output_folder
        self.base, self.process = base, process
        dtype, device = base.model.dtype, process.device
        peak = None if quiet else matmul_peak(dtype, device)
        self.advice = None if peak is None else dtype_advice(dtype, device, peak)
        self.display = TrainDisplay(
            f"{base.name}, {sequences.dialogues:,} dialogues, K = {config.block_size}",
            quiet=quiet,
            peak_flops=peak,
        )
        self.stopped, self.num_steps = False, steps_of(config, len(sequences))
        self.last_log: TrainLog | None = None
        self.origin = _origin(config, sequences, str(process.device)) | self.dual.config.provenance
        self.prompts = held_out_prompts(base, config.evaluate_prompts, config.block_size)
        self.scorer: Scorer | None = None
        self.held: RunFolder | None = None
        self.tracker: Any = None

    def begin(self, held: "RunFolder") -> None:
        """Start using the folder of the run, which this process has locked."""
        from orthrus.training.state_folder import state_file
        from orthrus.training.view_score import Scorer

        self.held = held
        begun = state_file(held.path).is_file()
        if self.advice is not None and not begun:
            # A run that has begun keeps its dtype, so it gets no advice.
            note(self.advice)
        if self.prompts:
            self.scorer = Scorer(
                self.base, self.prompts, held, self.origin, self.process, on_decoded=self.display.scoring
            )
            if begun:
                self.scorer.remember()

    def hooks(self) -> "Hooks":
        from orthrus.training.trainer import Hooks

        return Hooks(
            on_start=self._start,
            on_log=self._log,
            evaluate=None if self.scorer is None else self._score,
            should_stop=lambda: self.stopped,
        )

    def cancel(self) -> None:
        self.stopped = True
        self.display.stopping()

    def finish(self, state: "RunState") -> None:
        """Write the last view. The trainer has saved the state."""
        if self.tracker is not None:
            self.tracker.close()
        if self.is_main:
            from orthrus.training.run_folder import LAST
            from orthrus.training.view_score import keep_view

            assert self.held is not None, "begin comes before finish"
            scores = dict(state.scores)
            made = {"step": state.step, "tokens_per_cycle": scores.get(state.step)}
            keep_view(self.dual, self.held, LAST, self.origin | made)

    def report(self, state: "RunState") -> dict[str, Any]:
        from orthrus.training.run_folder import BEST, LAST

        log = self.last_log
        best = None if self.scorer is None else self.scorer.best
        return {
            "output": str(self.output),
            "view": str(self.output / LAST),
            "best_view": None if best is None else str(self.output / BEST),
            "step": state.step,
            "loss": None if log is None else log.loss,
            "accuracy": None if log is None else list(log.accuracy_J),
            "expected_tokens_per_cycle": None if log is None else log.expected_tokens,
            "diffusion_tokens_per_second": None if log is None else log.tokens_per_second,
            "decoded_tokens_per_cycle": [{"step": step, "value": value} for step, value in state.scores],
            "best": None if best is None else {"step": best[1], "tokens_per_cycle": best[0]},
            # A signal may have reached another process, or this one after the last step.
            "stopped": state.step < self.num_steps,
        }

    def _start(self, step: int, num_steps: int) -> None:
        from orthrus.training.trackers import open_trackers

        self.tracker = open_trackers(self.config.trackers, self.output, step)
        self.display.start(step, num_steps)

    def _log(self, log: "TrainLog") -> None:
        self.last_log = log
        self.display.log(log)
        if self.tracker is not None:
            self.tracker.log(log)

    def _score(self, dual: "DualView", step: int) -> float:
        assert self.scorer is not None
        self.display.scoring()
        value = self.scorer(dual, step)
        self.display.score(step, value, self.scorer.best == (value, step))
        if self.tracker is not None:
            self.tracker.score(step, value)
        return value


def _origin(config: "TrainConfig", sequences: "Packs", device: str) -> dict[str, Any]:
    """The part of the views' provenance that is known before the first step."""
    from orthrus.base.provenance import provenance
    from orthrus.training.recipe import to_plain

    packs = sequences.parts.values()
    parts = [
        {"folder": folder, "digest": pack.about.digest} | _counts([pack])
        for folder, pack in sequences.parts.items()
    ]
    sources = dict.fromkeys(source for pack in packs for source in pack.about.sources)
    return {
        "recipe": to_plain(config),
        "corpus": {"digest": sequences.digest} | _counts(packs) | {"sources": list(sources), "parts": parts},
        "run": provenance(device=device, dtype=config.dtype, seed=config.seed),
    }


def _counts(packs: "Iterable[Pack]") -> dict[str, Any]:
    domains = Counter[str]()
    dialogues = answer_tokens = 0
    for pack in packs:
        domains.update(pack.about.domains)
        dialogues += pack.about.dialogues
        answer_tokens += pack.about.answer_tokens
    return {"dialogues": dialogues, "answer_tokens": answer_tokens, "domains": dict(domains)}


def _print(report: dict[str, Any]) -> None:
    lines = [f"step {report['step']}, last view in {report['view']}"]
    if report["loss"] is not None:
        lines[0] += (
            f": loss {report['loss']:.4f}, expected tokens per cycle "
            f"{report['expected_tokens_per_cycle']:.2f}"
        )
    if report["best"] is not None:
        best = report["best"]
        lines.append(
            f"best view in {report['best_view']}: {best['tokens_per_cycle']:.2f} tokens per cycle in real "
            f"decodes of held-out prompts, at step {best['step']}"
        )
    out("\n".join(lines) + "\n")
