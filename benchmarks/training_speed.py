"""Diffusion targets a second, against the machine's peak: python benchmarks/training_speed.py CORPUS [--help]

Every setting runs in a process of its own, so that its peak memory is its own. The share of the peak is the
step's arithmetic (matrix products and attention, counted by torch) / step time / the best measured product.
"""

import json
import multiprocessing
import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer

from orthrus.base.loading import load_base
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.training.blocks import BlockLayout, draw_blocks
from orthrus.training.corpus import load_corpus
from orthrus.training.forward import Objective, TrainingPass
from orthrus.training.packing import pack
from orthrus.training.recipe import TrainConfig
from orthrus.training.speed import FlopCounter, matmul_peak
from orthrus.training.start import starting_view


@dataclass(frozen=True, slots=True)
class Setting:
    dtype: str
    block_size: int
    num_anchors: int
    row_length: int


SETTINGS = (
    Setting("float32", 8, 96, 576),
    Setting("bfloat16", 8, 96, 576),
    Setting("bfloat16", 8, 24, 576),
    Setting("bfloat16", 8, 96, 1024),
    Setting("bfloat16", 16, 45, 576),
)


def main(
    corpus: Annotated[Path, typer.Argument(help="A folder that `orthrus synth` made.")],
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps, after one that warms up.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time single steps of one row each."""
    results = []
    for setting in SETTINGS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(measure, (setting, corpus, repeats, device)))
        typer.echo(json.dumps(results[-1]))
    report = {
        "results": results,
        "formulas": {
            "targets_per_second": "draft rows with a loss / median step time, optimizer included",
            "share_of_peak": "operations of a step / median step time / peak_flops",
            "peak_flops": "best of repeated square matrix products of that dtype, same process",
            "peak_memory_bytes": "high-water mark of the process (CPU) or of the allocator (GPU)",
        },
        "options": {"repeats": repeats, "threads": torch.get_num_threads()},
        "provenance": provenance(device=device, dtype="as listed", seed=0),
    }
    if output is not None:
        write_text_atomic(output, json.dumps(report, indent=2) + "\n")


def measure(setting: Setting, corpus: Path, repeats: int, device: str) -> dict[str, Any]:
    """One setting: median step time, operations, peak and memory."""
    config = TrainConfig(block_size=setting.block_size)
    base = load_base("default", dtype=setting.dtype, device=device)
    dual = starting_view(base, config)
    for parameter in dual.view_parameters().values():
        parameter.data = parameter.data.float()
    rows = pack(load_corpus(corpus), setting.row_length, drop_long=True)
    training = TrainingPass(dual, Objective())
    optimizer = torch.optim.AdamW(dual.view_parameters().values(), lr=1e-5)
    layout = BlockLayout(block_size=setting.block_size)
    low = setting.dtype == "bfloat16"

    def step(index: int) -> tuple[float, int]:
        batch = draw_blocks([rows[index % len(rows)]], [index], setting.num_anchors, layout).to(device)
        started = perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=low):
            output = training(batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        num_targets = int(output.counts_J.sum())
        return perf_counter() - started, num_targets

    step(0)
    with FlopCounter() as counter:
        _, counted_targets = step(1)
    timed = [step(1) for _ in range(repeats)]
    seconds = median(seconds for seconds, _ in timed)
    peak = matmul_peak(base.model.dtype, device)
    memory = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return asdict(setting) | {
        "targets": counted_targets,
        "step_seconds": [round(seconds, 4) for seconds, _ in timed],
        "targets_per_second": round(counted_targets / seconds, 1),
        "step_flops": counter.total,
        "peak_flops": round(peak),
        "share_of_peak": round(counter.total / seconds / peak, 3),
        "peak_memory_bytes": memory,
    }


if __name__ == "__main__":
    typer.run(main)
