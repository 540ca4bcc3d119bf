"""Packing a large corpus: tokens a second, and what a process needs that trains on it.

    python benchmarks/packing.py --tokens 1e8 --output benchmarks/results/packing-cpu.json

The corpus is made up: random ids of a vocabulary of 49,152, dialogues of 200 to 1,600 tokens, a quarter of each the
prompt. Packing runs in a process of its own, and so does the rank, which opens the sequences and builds the blocks of
its share of some steps.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance

SEQUENCE_LENGTH, RANKS, BATCH_SIZE, STEPS = 2048, 8, 128, 20
_SHARD = 2048
_VOCAB = 49_152


def main(
    tokens: Annotated[float, typer.Option(help="Of the corpus.")] = 1e8,
    folder: Annotated[
        Path | None, typer.Option(help="Where to make it. Left out: a temporary folder.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The result file.")] = Path(
        "benchmarks/results/packing-cpu.json"
    ),
    pack: Annotated[Path | None, typer.Option(hidden=True)] = None,
    rank: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Make the corpus, pack it, and be a rank that reads it."""
    if pack is not None or rank is not None:
        print(json.dumps(_pack(pack) if pack is not None else _rank(rank)))  # type: ignore[arg-type]
        return
    with TemporaryDirectory(dir=folder) as made:
        corpus = Path(made) / "corpus"
        size = _make(corpus, int(tokens))
        typer.echo(f"made a corpus of {size / 1e6:,.0f} MB", err=True)
        found = {"corpus_bytes": size, "packing": _alone("--pack", corpus), "rank": _alone("--rank", corpus)}
        # What a second start costs: the pack is there, and the corpus unchanged.
        found["rank_again"] = _alone("--rank", corpus)
    result = {
        "kind": "orthrus-packing",
        "settings": {
            "sequence_length": SEQUENCE_LENGTH,
            "ranks": RANKS,
            "batch_size": BATCH_SIZE,
            "steps": STEPS,
            "vocabulary": _VOCAB,
        },
        **found,
        "provenance": provenance(device="cpu", dtype="float32", seed=0),
    }
    write_text_atomic(output, json.dumps(result, indent=2) + "\n")
    typer.echo(json.dumps(found, indent=2))


def _alone(option: str, corpus: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, option, str(corpus)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _make(folder: Path, tokens: int) -> int:
    """Write the corpus, shard by shard; returns its bytes."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    number = made = 0
    with (folder / "prompts.jsonl").open("w") as prompts:
        while made < tokens:
            lines = []
            for length in generator.integers(200, 1600, _SHARD).tolist():
                ids = generator.integers(3, _VOCAB, length).tolist()
                cut = length // 4
                prompts.write(
                    json.dumps({"prompt_ids": ids[:cut], "domain": "made up"}, separators=(",", ":")) + "\n"
                )
                answer = {"prompt": number, "answer_ids": ids[cut:], "finished": True}
                lines.append(json.dumps(answer, separators=(",", ":")) + "\n")
                number, made = number + 1, made + length
                if made >= tokens:
                    break
            (folder / f"answers-{(number - 1) // _SHARD:05d}.jsonl").write_text("".join(lines))
    return sum(file.stat().st_size for file in folder.iterdir())


def _pack(corpus: Path) -> dict[str, Any]:
    from orthrus.training.packs import packed

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu_began = perf_counter(), process_time()
    about = packed(corpus, SEQUENCE_LENGTH).about
    seconds, cpu_seconds = perf_counter() - began, process_time() - cpu_began
    return {
        "tokens": about.tokens,
        "dialogues": about.dialogues,
        "sequences": about.num_sequences,
        "filled": about.tokens / (about.num_sequences * SEQUENCE_LENGTH),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": about.tokens / seconds,
        "tokens_per_cpu_second": about.tokens / cpu_seconds,
        "bytes_on_disk": about.num_sequences * SEQUENCE_LENGTH * 4,
        "peak_bytes_above_imports": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    }


def _rank(corpus: Path) -> dict[str, Any]:
    """As `train` does it: open the sequences, then the blocks of this rank's share of each step."""
    from orthrus.training.blocks import BlockLayout, draw_blocks
    from orthrus.training.packs import packed_corpora
    from orthrus.training.trainer import sequences_of_step

    process = psutil.Process()
    before, began = process.memory_full_info(), perf_counter()
    sequences = packed_corpora([str(corpus)], SEQUENCE_LENGTH)
    opened = perf_counter() - began
    at_start = process.memory_full_info()
    layout, times = BlockLayout(block_size=32), []
    for step in range(STEPS):
        mine = sequences_of_step(len(sequences), BATCH_SIZE, step, 0)[::RANKS]
        began = perf_counter()
        for index, seed in mine:
            draw_blocks([sequences[index]], [seed], 256, layout)
        times.append((perf_counter() - began) / len(mine))
    after = process.memory_full_info()
    return {
        "seconds_to_open": opened,
        "bytes_to_open": at_start.uss - before.uss,
        "own_bytes_after_steps": after.uss - before.uss,
        "mapped_bytes_after_steps": after.shared - before.shared,
        "sequences_read": STEPS * BATCH_SIZE // RANKS,
        "seconds_per_sequence_with_blocks": sorted(times)[len(times) // 2],
    }


if __name__ == "__main__":
    typer.run(main)
