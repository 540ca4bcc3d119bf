"""Diffusion targets a second, against the machine's peak: python benchmarks/training_speed.py CORPUS [--help]

Every setting runs in a process of its own, so that its peak memory is its own. With --against SRC the package of
another checkout runs in turn with this one, round by round. Steps are the trainer's own, clipping and optimizer
included. On a machine that others use too, CPU seconds on one thread say more than the clock.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Annotated, Any

import torch
import typer

from orthrus.base.loading import load_base
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.training.blocks import BlockLayout, draw_blocks
from orthrus.training.forward import Objective, TrainingPass
from orthrus.training.packs import packed_corpora
from orthrus.training.recipe import TrainConfig
from orthrus.training.speed import FlopCounter, matmul_peak
from orthrus.training.start import starting_view
from orthrus.training.trainer import Hooks, TrainLog, sequences_of_step, train

_WARM = 2
"""Steps before the timed ones: the first runs under a counter of operations."""


@dataclass(frozen=True, slots=True)
class Setting:
    dtype: str
    block_size: int
    num_anchors: int
    sequence_length: int


SETTINGS = (
    Setting("float32", 8, 96, 576),
    Setting("bfloat16", 8, 96, 576),
    Setting("bfloat16", 8, 24, 576),
    Setting("bfloat16", 8, 96, 1024),
    Setting("bfloat16", 16, 45, 576),
)
FORMULAS = {
    "targets": "draft rows with a loss, mean over the timed steps",
    "targets_per_second": "targets / median step time by the clock",
    "targets_per_cpu_second": "targets / median step time in CPU seconds of the process",
    "share_of_peak": "operations of a step (matrix products and attention, counted by torch) / median step "
    "time / peak_flops",
    "peak_flops": "best of repeated square matrix products of that dtype, same process",
    "peak_memory_bytes": "high-water mark of the process (CPU) or of the allocator (GPU)",
}


def main(
    corpus: Annotated[Path, typer.Argument(help="A folder that `orthrus synth` made.")],
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps, after two that warm up.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each setting is measured.")] = 1,
    only: Annotated[
        list[int] | None, typer.Option(metavar="NUMBER", help="A setting, from 0; may be repeated.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="SRC", help="The src folder of another checkout, measured in turn.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    single: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time single steps of one sequence each."""
    if single is not None:
        typer.echo(json.dumps(measure(SETTINGS[single], corpus, repeats, device)))
        return
    sides = {"this": None} if against is None else {"other": against, "this": None}
    results = []
    for number in only or range(len(SETTINGS)):
        for round_number in range(rounds):
            for side, source in sides.items():
                found = _in_a_process(number, corpus, repeats, device, source)
                results.append({"side": side, "round": round_number} | found)
                typer.echo(json.dumps(results[-1]), err=True)
    report = {
        "results": results,
        "formulas": FORMULAS,
        "options": {"repeats": repeats, "rounds": rounds, "threads": torch.get_num_threads()},
        "provenance": provenance(device=device, dtype="as listed", seed=0),
    }
    if output is not None:
        write_text_atomic(output, json.dumps(report, indent=2) + "\n")


def _in_a_process(
    number: int, corpus: Path, repeats: int, device: str, source: Path | None
) -> dict[str, Any]:
    environment = dict(os.environ)
    if source is not None:
        environment["PYTHONPATH"] = str(source.resolve())
    command = [sys.executable, __file__, str(corpus), "--single", str(number)]
    command += ["--repeats", str(repeats), "--device", device]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(setting: Setting, corpus: Path, repeats: int, device: str) -> dict[str, Any]:
    """One setting: median step time, operations, peak and memory."""
    config = TrainConfig(
        block_size=setting.block_size,
        num_anchors=setting.num_anchors,
        sequence_length=setting.sequence_length,
        batch_size=1,
        steps=_WARM + repeats,
        log_every=1,
        save_every=2**20,
        evaluate_prompts=0,
        trackers=(),
        dtype=setting.dtype,  # type: ignore[arg-type]
    )
    base = load_base("default", dtype=setting.dtype, device=device)
    dual = starting_view(base, config)
    sequences = packed_corpora([str(corpus)], setting.sequence_length, drop_long=True)
    times: list[tuple[float, float]] = []

    def note(log: TrainLog) -> None:
        times.append((perf_counter(), process_time()))

    with TemporaryDirectory() as folder:
        # The state is written after the last step has been timed.
        train(dual, sequences, replace(config, output=folder), "", Hooks(on_log=note))
    steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(times)]
    seconds, cpu_seconds = (median(step[i] for step in steps[_WARM - 1 :]) for i in range(2))

    layout = BlockLayout(block_size=setting.block_size)
    drawn = [
        draw_blocks([sequences[index]], [seed], setting.num_anchors, layout)
        for step in range(_WARM, _WARM + repeats)
        for index, seed in sequences_of_step(len(sequences), 1, step, config.seed)
    ]
    targets = sum(int(batch.valid_BNJ.sum()) for batch in drawn) / len(drawn)
    with (
        FlopCounter() as counter,
        torch.autocast(device, torch.bfloat16, enabled=setting.dtype == "bfloat16"),
    ):
        TrainingPass(dual, Objective())(drawn[0].to(device)).loss.backward()
    peak = matmul_peak(base.model.dtype, device)
    memory = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return asdict(setting) | {
        "targets": targets,
        "step_seconds": [round(step[0], 4) for step in steps[_WARM - 1 :]],
        "step_cpu_seconds": [round(step[1], 4) for step in steps[_WARM - 1 :]],
        "targets_per_second": round(targets / seconds, 1),
        "targets_per_cpu_second": round(targets / cpu_seconds, 1),
        "step_flops": counter.total,
        "peak_flops": round(peak),
        "share_of_peak": round(counter.total / seconds / peak, 3),
        "peak_memory_bytes": memory,
    }


if __name__ == "__main__":
    typer.run(main)
