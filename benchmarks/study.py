"""What a view learns from a fixed number of diffusion targets: python benchmarks/study.py run CORPUS

Each arm changes one thing of recipes/study-cpu.yaml, starts from the AR projections, and is scored by real
greedy decoding of the built-in bench prompts, which no corpus of ours contains. Arms that the result file
has already are not run again. `python benchmarks/study.py render` writes the tables into docs/study.md.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer
from study_arms import ARMS, RECIPE, Arm
from study_tables import render
from two_steps import TwoSteps

from orthrus.base.bench_prompts import load_prompts
from orthrus.base.loading import Base, load_base
from orthrus.base.outputs import write_text_atomic
from orthrus.base.owned import LOCK
from orthrus.base.provenance import provenance
from orthrus.config import DecodeConfig
from orthrus.engine.engine import Engine, EngineConfig
from orthrus.engine.stream import TokenStream
from orthrus.model.dual_view import DualView
from orthrus.model.runner import EagerRunner
from orthrus.training.blocks import BlockLayout, draw_blocks
from orthrus.training.packing import PackedSequence
from orthrus.training.packs import Packs, packed_corpora
from orthrus.training.recipe import TrainConfig, to_plain
from orthrus.training.recipe_file import load_recipe
from orthrus.training.run_folder import RUN_FILE
from orthrus.training.start import starting_view
from orthrus.training.state_folder import drop_state
from orthrus.training.trainer import Hooks, TrainLog, sequences_of_step, train
from orthrus.training.view_score import served

FORMULAS = {
    "tokens_per_cycle": "(tokens - 1) / cycles, pooled over prompts; the AR view's own tokens included",
    "tokens_per_forward": "tokens / all passes, prefill and both views, pooled",
    "targets": "draft rows that a loss was taken of, in training",
}


def main(
    corpus: Annotated[Path, typer.Argument(help="A folder that `orthrus synth` made.")],
    runs: Annotated[Path, typer.Option(help="Where unfinished arms keep their state.")] = Path("runs/study"),
    output: Annotated[Path, typer.Option(help="The result file; arms in it are kept.")] = Path(
        "benchmarks/results/study-cpu.json"
    ),
    targets: Annotated[int, typer.Option(min=1, help="Diffusion targets of each arm.")] = 40_000,
    num_prompts: Annotated[int, typer.Option(min=1, help="Built-in prompts, a domain in turn.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    only: Annotated[list[str] | None, typer.Option(help="An arm's name; may be repeated.")] = None,
) -> None:
    """Train and score all arms, one after the other."""
    options = {"targets": targets, "num_prompts": num_prompts, "max_new_tokens": max_new_tokens}
    report = _open(output, options, _sequences(corpus, load_recipe(Path(RECIPE), [])))
    for arm in ARMS:
        if arm.name in report["arms"] or (only and arm.name not in only):
            continue
        typer.echo(f"{arm.name}: {arm.overrides}", err=True)
        report["arms"][arm.name] = _run(arm, corpus, runs / arm.name, **options)
        write_text_atomic(output, json.dumps(report, indent=2) + "\n")


def _sequences(corpus: Path, config: TrainConfig) -> Packs:
    return packed_corpora([str(corpus)], config.sequence_length, drop_long=True)


def _open(output: Path, options: dict[str, int], sequences: Packs) -> dict[str, Any]:
    """The report so far, or a new one; refuses to mix settings or corpora."""
    about = {"options": options, "corpus": {"digest": sequences.digest, "dialogues": sequences.dialogues}}
    if output.is_file():
        report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        if {key: report[key] for key in about} != about:
            raise typer.BadParameter(f"{output} was made with another corpus or other options")
        return report
    return {**about, "formulas": FORMULAS, "recipe": RECIPE, "arms": {}}


def _run(
    arm: Arm, corpus: Path, folder: Path, *, targets: int, num_prompts: int, max_new_tokens: int
) -> dict[str, Any]:
    config = load_recipe(Path(RECIPE), [f"{key}={json.dumps(value)}" for key, value in arm.overrides.items()])
    sequences = _sequences(corpus, config)
    num_steps, num_targets = _budget(config, sequences, targets)
    config = replace(config, steps=num_steps, output=str(folder))
    base = load_base(config.base, dtype=config.dtype)
    dual = starting_view(base, config)
    logs: list[TrainLog] = []
    began = monotonic()
    train(dual, sequences, config, sequences.digest, Hooks(on_log=logs.append))
    seconds = monotonic() - began
    prompts = _prompts(base, num_prompts)
    scores = {str(n): _score(dual, base, prompts, max_new_tokens, n) for n in arm.denoising_steps}
    # Its own files only: the folder may have been there before.
    drop_state(folder)
    for name in (RUN_FILE, LOCK):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
    return {
        "overrides": arm.overrides,
        "recipe": to_plain(config),
        "steps": num_steps,
        "targets": num_targets,
        "view_parameters": dual.num_view_parameters(),
        "train_seconds": round(seconds, 1),
        "loss": logs[-1].loss,
        "accuracy": list(logs[-1].accuracy_J),
        "scores_by_denoising_steps": scores,
        "provenance": provenance(device=str(dual.device), dtype=config.dtype, seed=config.seed),
    }


def _budget(config: TrainConfig, sequences: Sequence[PackedSequence], targets: int) -> tuple[int, int]:
    """(steps, targets): as many whole steps as it takes to see `targets` of them."""
    layout = BlockLayout(block_size=config.block_size)
    seen = step = 0
    while seen < targets:
        for index, seed in sequences_of_step(len(sequences), config.batch_size, step, config.seed):
            seen += int(draw_blocks([sequences[index]], [seed], config.num_anchors, layout).valid_BNJ.sum())
        step += 1
    return step, seen


def _prompts(base: Base, number: int) -> list[tuple[str, list[int]]]:
    """(domain, token ids) of the built-in prompts, one of each domain in turn."""
    prompts = load_prompts()
    domains = list(dict.fromkeys(p.domain for p in prompts))
    by_domain = [[p for p in prompts if p.domain == domain] for domain in domains]
    turns = [p for group in zip(*by_domain, strict=False) for p in group]
    return [(p.domain, base.encode_prompt(p.prompt)) for p in turns[:number]]


def _score(
    dual: DualView,
    base: Base,
    prompts: list[tuple[str, list[int]]],
    max_new_tokens: int,
    denoising_steps: int,
) -> list[dict[str, Any]]:
    """Greedy chain decoding of each prompt: its tokens, cycles and passes."""
    config = DecodeConfig(strategy="chain", max_new_tokens=max_new_tokens)
    scored = []
    with served(dual):
        runner = EagerRunner(dual)
        # No request leaves history for another: every prompt's passes are counted.
        engine = Engine(TwoSteps(runner) if denoising_steps == 2 else runner, EngineConfig(reuse=False))
        for domain, prompt_ids in prompts:
            request = engine.submit(prompt_ids, config, eos_token_ids=base.eos_token_ids)
            stats = TokenStream(engine, request).drain().stats
            # Every draft pass of two denoising steps is two passes; each chain cycle has one.
            extra = (denoising_steps - 1) * stats.num_cycles
            scored.append(
                {
                    "domain": domain,
                    "tokens": stats.num_tokens,
                    "cycles": stats.num_cycles,
                    "passes": stats.num_passes + extra,
                }
            )
    return scored


app = typer.Typer(add_completion=False)
app.command("run")(main)
app.command("render")(render)

if __name__ == "__main__":
    app()
