"""Peak memory of decoding over that of the plain base model: python benchmarks/peak_memory.py [--help]

Every arm loads and decodes in a process of its own, so that its peak is its own.
"""

import gc
import json
import multiprocessing
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from orthrus.api import Orthrus, decode_config
from orthrus.base import load_base
from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.engine.stock import stock_generate

BASE = "plain base"
PROMPT = "Explain how a bicycle stays upright."
LEGEND = {
    "peak_bytes": "high-water mark while decoding, weights included and loading apart: of PyTorch's "
    "allocator (GPU), or of the process's resident memory (CPU, Linux)",
    "over_base": "peak_bytes / that of the plain base model, which answers by the stock model's own generate",
}


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file or 'default'.")] = "default",
    view: Annotated[str, typer.Option(help="View folder, 'default' or 'untrained'.")] = "default",
    dtype: Annotated[str, typer.Option(help="As for Orthrus.load.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    runner: Annotated[str, typer.Option(help="As for Orthrus.load.")] = "auto",
    strategy: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    num_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 256,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print a table, keep the result."""
    results: dict[str, dict[str, float]] = {}
    for arm in (BASE, *(strategy or ("ar", "chain", "fused", "auto"))):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_bytes, (arm, model, view, dtype, device, runner, num_tokens))
        base_peak = results[BASE]["peak_bytes"] if results else peak
        results[arm] = {"peak_bytes": peak, "over_base": peak / base_peak}
        typer.echo(f"{arm}: {peak / 1e6:.0f} MB", err=True)
    report: dict[str, Any] = {
        "kind": "orthrus-peak-memory",
        "legend": LEGEND,
        "results": results,
        "options": {"model": model, "view": view, "runner": runner, "num_tokens": num_tokens},
        "provenance": provenance(device=device, dtype=dtype, seed=None),
    }
    path = output or Path(__file__).parent / "results" / f"peak-memory-{device}.json"
    write_text_atomic(path, json.dumps(report, indent=2) + "\n")
    rows = [[arm, f"{r['peak_bytes'] / 1e6:.0f}", f"{r['over_base']:.2f}"] for arm, r in results.items()]
    typer.echo(markdown_table(["", "peak MB", "over the plain base"], rows))


def peak_bytes(arm: str, model: str, view: str, dtype: str, device: str, runner: str, num_tokens: int) -> int:
    """Of one arm, in this process: the base alone, or Orthrus with a strategy."""
    if arm == BASE:
        base = load_base(model, dtype=dtype, device=device)
        prompt_ids = base.encode_prompt(PROMPT)
        forget_peak(device)
        stock_generate(base.model, prompt_ids, max_new_tokens=num_tokens, eos_token_ids=frozenset())
    else:
        orthrus = Orthrus.load(model, view, dtype, device, runner=runner)
        config = decode_config(strategy=arm, max_new_tokens=num_tokens, ignore_eos=True)
        prompt_ids = orthrus.base.encode_prompt(PROMPT)
        forget_peak(device)
        orthrus.stream_ids(prompt_ids, config).drain()
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def forget_peak(device: str) -> None:
    """From now on the peak is that of what follows."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    typer.run(main)
