"""Rivals without training, one base, the same prompts, taking turns: python benchmarks/rivals OUT.json [--help]

Leave the machine alone meanwhile; --quick rehearses.
"""

import json
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from arms import Answer, Arm, compiled_stock, llama_cpp, ours, stock
from servers import server

from orthrus.api import Orthrus
from orthrus.base.bench_prompts import load_prompts
from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import check_report, write_text_atomic
from orthrus.base.provenance import installed_version, provenance
from orthrus.bench.cycles import without_reuse
from orthrus.bench.records import output_digest
from orthrus.bench.runner import prompts_digest
from orthrus.bench.statistics import Interval

STOCK, SETTLE_S = "stock generate", 0.02
LEGEND = {
    "speedup": "whole time of stock generate / of the arm, same prompt and repeat; median over repeats; geometric "
    "mean over prompts; interval: 95 % of a bootstrap over prompts (10,000 draws, seed 0)",
    "tokens_per_second": "sum of new tokens / sum of whole time, prompt included; median over repeats",
    "ttft_ms": "time to the first new token; median over prompts of the median over repeats; null of servers",
    "tokens_per_pass": "sum of new tokens / sum of passes of the model, prompts' included; null where not counted",
    "num_equal": "prompts whose tokens equal stock generate's in every repeat; llama.cpp computes in Q4_1",
    "runs": "by arm, prompt and repeat; output: a digest of the new tokens",
}


def main(
    output: Annotated[Path, typer.Argument(help="JSON file to write.")],
    prompts: Annotated[Path | None, typer.Option(help="JSONL file; left out, the built-in ones.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each domain.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds of each prompt.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    lookup: Annotated[int, typer.Option(min=1, help="Tokens that prompt lookup copies at once.")] = 10,
    strategy: Annotated[
        list[str] | None, typer.Option(help="Of ours; may be repeated. Left out: ar, auto.")
    ] = None,
    servers: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            metavar="NAME=URL",
            help="A server of the same model that runs already, such as llama.cpp's or vLLM's; may be repeated.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the stock arms and ours: float32 or bfloat16.")] = "float32",
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="The torch.compile arm.")] = True,
    quick: Annotated[bool, typer.Option(help="One prompt a domain, one repeat, 16 tokens.")] = False,
) -> None:
    """Measure, print a table, and keep every run."""
    if quick:
        limit, repeats, max_new_tokens = 1, 1, 16
    check_report(output)
    asked = load_prompts(prompts, (), limit)
    others = dict(map(server, servers or []))
    if len(others) < len(servers or []):
        raise typer.BadParameter("two servers have one name: their figures could not be told apart")
    orthrus = without_reuse(Orthrus.load(dtype=dtype))
    ids = [orthrus.base.encode_prompt(prompt.prompt) for prompt in asked]
    longest = max(map(len, ids)) + max_new_tokens + 1
    strategies = strategy or ["ar", "auto"]
    arms: dict[str, Arm] = {STOCK: stock(orthrus)}
    if compile_:
        arms["stock, static cache, torch.compile"] = compiled_stock(orthrus, longest)
    arms["stock, prompt lookup"] = stock(orthrus, prompt_lookup_num_tokens=lookup)
    arms |= {f"orthrus {name}": ours(orthrus, name) for name in strategies}
    if (llama := llama_cpp(torch.get_num_threads(), longest)) is not None:
        arms["llama.cpp"] = llama
    arms |= others
    if "auto" in strategies:
        orthrus.time_passes()
    runs = measure(arms, ids, max_new_tokens, repeats)
    results = {name: summary(runs[name], runs[STOCK]) for name in arms}
    about = orthrus.describe()
    report = {
        "kind": "orthrus-rivals",
        "legend": LEGEND,
        "results": results,
        "options": {
            "max_new_tokens": max_new_tokens,
            "repeats": repeats,
            "limit": limit,
            "lookup": lookup,
            "servers": list(others),
        },
        "prompts": {"digest": prompts_digest(asked), "domains": [prompt.domain for prompt in asked]},
        "model": about,
        "llama_cpp": installed_version("llama-cpp-python"),
        "provenance": provenance(device=about["device"], dtype=about["dtype"], seed=None),
        "runs": {name: [[kept(answer) for answer in row] for row in rows] for name, rows in runs.items()},
    }
    write_text_atomic(output, json.dumps(report, indent=1) + "\n")
    typer.echo(table(results))


def measure(
    arms: dict[str, Arm], ids: list[list[int]], num_new: int, repeats: int
) -> dict[str, list[list[Answer]]]:
    """By arm, prompt and repeat. Each arm answers the first prompt once unmeasured; arms then take turns on every
    prompt, and begin with another one each time."""
    for name, arm in arms.items():
        typer.echo(f"warming up: {name}", err=True)
        arm(ids[0], min(num_new, 8))
    names = list(arms)
    runs: dict[str, list[list[Answer]]] = {name: [[] for _ in ids] for name in names}
    for repeat in range(repeats):
        for prompt, prompt_ids in enumerate(ids):
            turn = (repeat + prompt) % len(names)
            for name in names[turn:] + names[:turn]:
                time.sleep(SETTLE_S)
                answer = arms[name](prompt_ids, num_new)
                assert len(answer.token_ids) == num_new, f"{name} gave {len(answer.token_ids)} tokens"
                runs[name][prompt].append(answer)
        typer.echo(f"repeat {repeat + 1} of {repeats}", err=True)
    return runs


def summary(mine: list[list[Answer]], base: list[list[Answer]]) -> dict[str, Any]:
    """As `LEGEND` says."""
    ratios = [
        median(b.total_ms / m.total_ms for m, b in zip(some, others, strict=True))
        for some, others in zip(mine, base, strict=True)
    ]
    found = Interval.geometric_mean([ratios])
    passes = [answer.num_passes for row in mine for answer in row]
    times = [[answer.ttft_ms for answer in row] for row in mine]
    known = [[ms for ms in row if ms is not None] for row in times]
    tokens = sum(len(answer.token_ids) for row in mine for answer in row)
    return {
        "speedup": found.value,
        "interval": [found.low, found.high],
        "tokens_per_second": median(
            1e3 * sum(len(row[i].token_ids) for row in mine) / sum(row[i].total_ms for row in mine)
            for i in range(len(mine[0]))
        ),
        "ttft_ms": median(map(median, known)) if known == times else None,
        "tokens_per_pass": None if None in passes else tokens / sum(p for p in passes if p is not None),
        "num_equal": sum(
            all(m.token_ids == b.token_ids for m, b in zip(some, others, strict=True))
            for some, others in zip(mine, base, strict=True)
        ),
        "num_prompts": len(mine),
    }


def kept(answer: Answer) -> dict[str, Any]:
    digest = output_digest(answer.token_ids)
    ttft_ms = None if answer.ttft_ms is None else round(answer.ttft_ms, 3)
    return {"tokens": len(answer.token_ids), "ttft_ms": ttft_ms,
            "total_ms": round(answer.total_ms, 3), "passes": answer.num_passes, "output": digest}  # fmt: skip


def table(results: dict[str, dict[str, Any]]) -> str:
    header = ["arm", "speed-up", "95 %", "tokens/s", "first token, ms", "tokens per pass", "equal texts"]
    lines = [
        [name, f"{r['speedup']:.2f}",
         "–" if None in r["interval"] else " to ".join(f"{end:.2f}" for end in r["interval"]),
         f"{r['tokens_per_second']:.1f}", "–" if r["ttft_ms"] is None else f"{r['ttft_ms']:.0f}",
         "–" if r["tokens_per_pass"] is None else f"{r['tokens_per_pass']:.2f}",
         f"{r['num_equal']} of {r['num_prompts']}"]
        for name, r in results.items()
    ]  # fmt: skip
    return markdown_table(header, lines)


if __name__ == "__main__":
    typer.run(main)
