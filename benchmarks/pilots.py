"""Pilots for the next view, at an equal number of diffusion targets: python benchmarks/pilots.py CORPUS [--help]

Each arm changes one thing of recipes/pilots-cpu.yaml and is scored by real greedy decoding of the built-in bench
prompts, which no corpus of ours contains. An arm that is interrupted goes on from its last save; one whose result
file is there is not run again: the same command goes on wherever it was stopped. `--table` prints what there is.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from time import monotonic, process_time
from typing import Annotated, Any

import typer
from pilot_arms import ARMS, RECIPE, Arm

from orthrus.base.loading import load_base
from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.training.blocks import BlockLayout, draw_blocks
from orthrus.training.packing import PackedSequence
from orthrus.training.packs import packed_corpora
from orthrus.training.recipe import TrainConfig, to_plain
from orthrus.training.recipe_file import load_recipe
from orthrus.training.start import starting_view
from orthrus.training.trainer import Hooks, TrainLog, sequences_of_step, train
from orthrus.training.view_score import decoded_each, held_out_prompts

FORMULAS = {
    "tokens_per_cycle": "(tokens - 1) / cycles, pooled over prompts; the AR view's own tokens included; chain, greedy",
    "targets": "draft rows that a loss was taken of; of blocks at rejected drafts as many were drawn, and a few "
    "fewer fit into their answers",
    "prompts": "(tokens - 1, cycles) of each held-out prompt",
}
RESAMPLES = 10_000


def main(
    corpus: Annotated[Path, typer.Argument(help="A folder that `orthrus synth` made.")],
    runs: Annotated[Path, typer.Option(help="Where unfinished arms keep their state.")] = Path("runs/pilots"),
    results: Annotated[Path, typer.Option(help="Where result files go.")] = Path("benchmarks/results"),
    targets: Annotated[int, typer.Option(min=1, help="Diffusion targets of each arm.")] = 20_000,
    num_prompts: Annotated[int, typer.Option(min=1, help="Built-in prompts, a domain in turn.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    only: Annotated[list[str] | None, typer.Option(help="An arm's name; may be repeated.")] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Run nothing: print the arms that are done.")
    ] = False,
) -> None:
    """Train and score all arms, one after the other."""
    if table:
        typer.echo(markdown_table(_HEADER, _rows(results), "lrrrr"))
        return
    for arm in ARMS:
        file = _file(results, arm.name)
        if file.is_file() or (only and arm.name not in only):
            continue
        typer.echo(f"{arm.name}: {arm.overrides}", err=True)
        options = {"targets": targets, "num_prompts": num_prompts, "max_new_tokens": max_new_tokens}
        report = _run(arm, corpus, runs / arm.name, **options)
        write_text_atomic(file, json.dumps(report | {"options": options}, indent=2) + "\n")
        rmtree(runs / arm.name)
        typer.echo(f"{arm.name}: {report['tokens_per_cycle']:.3f} tokens per cycle", err=True)


def _file(results: Path, name: str) -> Path:
    return results / f"pilot-{name}-cpu.json"


def _run(
    arm: Arm, corpus: Path, folder: Path, *, targets: int, num_prompts: int, max_new_tokens: int
) -> dict[str, Any]:
    overrides = [f"{key}={json.dumps(value)}" for key, value in arm.overrides.items()]
    config = load_recipe(Path(RECIPE), overrides)
    sequences = packed_corpora([str(corpus)], config.sequence_length, drop_long=True)
    num_steps, num_targets = _budget(config, sequences, targets)
    config = replace(config, steps=num_steps, output=str(folder))
    base = load_base(config.base, dtype=config.dtype)
    dual = starting_view(base, config)
    prompts = held_out_prompts(base, num_prompts, config.block_size)
    file = folder / "start.json"
    if not file.is_file():
        write_text_atomic(file, json.dumps(decoded_each(dual, base, prompts, max_new_tokens)) + "\n")
    logs: list[TrainLog] = []
    began, cpu_began = monotonic(), process_time()
    train(dual, sequences, config, sequences.digest, Hooks(on_log=lambda log: _say(log, logs)))
    seconds, cpu_seconds = monotonic() - began, process_time() - cpu_began
    scored = decoded_each(dual, base, prompts, max_new_tokens)
    return {
        "arm": arm.name,
        "label": arm.label,
        "against": arm.base,
        "overrides": arm.overrides,
        "recipe": to_plain(config),
        "steps": num_steps,
        "targets": num_targets,
        "view_parameters": dual.num_view_parameters(),
        "seconds_of_the_last_part": {"clock": round(seconds, 1), "cpu": round(cpu_seconds, 1)},
        "loss": logs[-1].loss if logs else None,
        "accuracy": list(logs[-1].accuracy_J) if logs else None,
        "tokens_per_cycle": _pooled(scored),
        "tokens_per_cycle_at_start": _pooled(json.loads(file.read_text())),
        "prompts": scored,
        "corpus": {"digest": sequences.digest, "dialogues": sequences.dialogues},
        "formulas": FORMULAS,
        "provenance": provenance(device=str(dual.device), dtype=config.dtype, seed=config.seed),
    }


def _say(log: TrainLog, logs: list[TrainLog]) -> None:
    logs.append(log)
    typer.echo(f"  step {log.step} of {log.num_steps}, loss {log.loss:.4f}", err=True)


def _budget(config: TrainConfig, sequences: Sequence[PackedSequence], targets: int) -> tuple[int, int]:
    """(steps, targets): as many whole steps as it takes to see `targets` of them, as the blocks are drawn."""
    layout = BlockLayout(block_size=config.block_size, first_target=config.first_target)
    seen = step = 0
    while seen < targets:
        for index, seed in sequences_of_step(len(sequences), config.batch_size, step, config.seed):
            seen += int(draw_blocks([sequences[index]], [seed], config.num_anchors, layout).valid_BNJ.sum())
        step += 1
    return step, seen


def _pooled(prompts: Sequence[Sequence[int]]) -> float:
    """Of records as `Decoded`."""
    return sum(each[0] for each in prompts) / sum(each[1] for each in prompts)


_HEADER = ("arm", "tokens per cycle", "at its start", "against its base", "targets")


def _rows(results: Path) -> list[list[str]]:
    """A line an arm that is done; differences are paired over prompts, with 95 % bootstrap intervals."""
    files = {arm.name: _file(results, arm.name) for arm in ARMS}
    done = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    lines = []
    for name, report in done.items():
        base = done.get(report["against"] or "")
        lines.append(
            [
                f"{name}: {report['label']}",
                f"{report['tokens_per_cycle']:.3f}",
                f"{report['tokens_per_cycle_at_start']:.3f}",
                "" if base is None else _difference(report["prompts"], base["prompts"]),
                f"{report['targets']:,}",
            ]
        )
    return lines


def _difference(prompts: list[tuple[int, int]], base: list[tuple[int, int]]) -> str:
    """Pooled tokens per cycle less the base's, and the interval over resampled prompts."""
    drawn = random.Random(0)
    found = []
    for _ in range(RESAMPLES):
        picks = drawn.choices(range(len(base)), k=len(base))
        found.append(_pooled([prompts[i] for i in picks]) - _pooled([base[i] for i in picks]))
    found.sort()
    low, high = (found[round(share * (RESAMPLES - 1))] for share in (0.025, 0.975))
    return f"{_pooled(prompts) - _pooled(base):+.3f} ({low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    typer.run(main)
