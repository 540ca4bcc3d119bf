"""Tokens per cycle on prompt files: python benchmarks/acceptance.py FILE.jsonl ... [--help]

No clocks: acceptance does not depend on the machine, so this may run beside other work.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from orthrus.api import Orthrus
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.bench.prompts import load_prompts
from orthrus.types import DecodeStats

FORMULAS = {
    "tokens_per_cycle": "(tokens - 1) / cycles, mean over prompts and pooled; own tokens included",
    "tokens_per_forward": "tokens / all passes, prefill included, pooled",
    "acceptance_rate": "accepted drafts / judged drafts, pooled",
}


def main(
    files: Annotated[list[Path], typer.Argument(help="JSONL files with `prompt`, `turns` or `messages`.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file or 'default'.")] = "default",
    view: Annotated[str, typer.Option(help="View folder, 'default' or 'fresh'.")] = "default",
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each file, from the top.")] = 40,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    floor: Annotated[bool, typer.Option(help="The AR row in the draft pass.")] = True,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Greedy `chain` on every prompt; prints a line a file."""
    orthrus = Orthrus.load(model, view, dtype)
    results = {file.stem: _measure(orthrus, file, limit, max_new_tokens, floor) for file in files}
    about = orthrus.describe()
    report = {
        "results": results,
        "formulas": FORMULAS,
        "options": {"limit": limit, "max_new_tokens": max_new_tokens, "floor": floor, "temperature": 0.0},
        "model": about,
        "provenance": provenance(device=about["device"], dtype=about["dtype"], seed=None),
    }
    if output is not None:
        write_text_atomic(output, json.dumps(report, indent=2) + "\n")
    typer.echo(json.dumps({name: round(r["tokens_per_cycle"], 3) for name, r in results.items()}))


def _measure(orthrus: Orthrus, file: Path, limit: int, max_new_tokens: int, floor: bool) -> dict[str, Any]:
    all_stats: list[DecodeStats] = []
    for prompt in load_prompts(file)[:limit]:
        result = orthrus.generate(prompt.prompt, max_new_tokens=max_new_tokens, floor=floor)
        all_stats.append(result.stats)
    # An answer of one token has no cycle.
    cycled = [s for s in all_stats if s.num_cycles]
    num_cycles = sum(s.num_cycles for s in cycled)
    measured = {
        "num_prompts": len(all_stats),
        "num_tokens": sum(s.num_tokens for s in all_stats),
        "tokens_per_cycle": sum(s.tokens_per_cycle for s in cycled) / len(cycled),
        "tokens_per_cycle_pooled": sum(s.num_tokens - 1 for s in cycled) / num_cycles,
        "tokens_per_forward": sum(s.num_tokens for s in all_stats) / sum(s.num_passes for s in all_stats),
        "acceptance_rate": sum(s.num_accepted for s in cycled) / max(1, sum(s.num_drafted for s in cycled)),
    }
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in measured.items() if isinstance(value, float))
    typer.echo(f"{file.stem}: {measured['num_prompts']} prompts, {numbers}", err=True)
    return measured


if __name__ == "__main__":
    typer.run(main)
