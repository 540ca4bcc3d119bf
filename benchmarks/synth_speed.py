"""How fast `orthrus synth` writes a corpus, and that no batch changes it: benchmarks/synth_speed.py FILE [--help]

The command runs as a user runs it, once for each batch size, on the same prompts. Leave the machine alone meanwhile.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any

import typer

from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.training.corpus import read_corpus, shard_path

LEGEND = {
    "answer_tokens": "tokens that the base wrote, of dialogues that were kept",
    "tokens_per_second": "answer_tokens / seconds of the whole command, start and loading included",
    "tokens_per_second_answering": "answer_tokens / (seconds - start_seconds)",
    "start_seconds": "of the same command for one prompt of one token: imports, loading, the first passes",
    "digest": "of all answers, in the prompts' order; equal digests are equal corpora",
}


def main(
    prompts: Annotated[Path, typer.Argument(help="JSONL file of prompts.")],
    output: Annotated[Path, typer.Argument(help="The result file, JSON.")],
    count: Annotated[int, typer.Option(min=1, help="Prompts.")] = 256,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="May be repeated; left out: 1, 16, 64.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the base.")] = "bfloat16",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
) -> None:
    """Time the command at each batch size."""
    results = []
    _, start = _synth(prompts, 1, 1, dtype, 1)
    for size in batch_size or [1, 16, 64]:
        made, seconds = _synth(prompts, count, size, dtype, max_new_tokens)
        tokens = made["answer_tokens"]
        results.append(
            made
            | {
                "batch_size": size,
                "seconds": round(seconds, 2),
                "start_seconds": round(start, 2),
                "tokens_per_second": round(tokens / seconds, 1),
                "tokens_per_second_answering": round(tokens / max(0.1, seconds - start), 1),
            }
        )
        typer.echo(json.dumps(results[-1]), err=True)
    report = {
        "kind": "orthrus-synth-speed",
        "legend": LEGEND,
        "results": results,
        "same_corpus": len({result["digest"] for result in results}) == 1,
        "options": {"prompts": prompts.name, "count": count, "max_new_tokens": max_new_tokens},
        "provenance": provenance(device="cpu", dtype=dtype, seed=0),
    }
    write_text_atomic(output, json.dumps(report, indent=2) + "\n")


def _synth(prompts: Path, count: int, batch: int, dtype: str, most: int) -> tuple[dict[str, Any], float]:
    """What the command made, and its seconds."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "corpus"
        command = [sys.executable, "-m", "orthrus.cli.app", "synth", str(folder), "--dtype", dtype, "--json"]
        command += ["--prompts", f"{prompts}:any:{count}", "--batch-size", str(batch), "--turns", "1"]
        command += ["--max-new-tokens", str(most), "--shard-size", str(count), "--quiet"]
        began = perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        seconds = perf_counter() - began
        report = json.loads(done.stdout)
        digest = hashlib.blake2b(shard_path(folder, 0).read_bytes(), digest_size=16).hexdigest()
        answers = sum(1 for _ in read_corpus(folder))
    return {"answers": answers, "answer_tokens": report["answer_tokens"], "digest": digest}, seconds


if __name__ == "__main__":
    typer.run(main)
