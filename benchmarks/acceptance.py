"""What strategies save on prompt files: python benchmarks/acceptance.py FILE.jsonl ... [--help]

Counts passes and rows, reads no clock: this does not depend on the machine, so it may run beside other work.
Pairs of strategy and file that the result has already are not measured again: the same command goes on
where it was interrupted, and one with further strategies or files adds them.
"""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from orthrus.api import Orthrus
from orthrus.base.bench_prompts import BenchPrompt, load_prompts
from orthrus.base.fingerprint import weights_fingerprint
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.bench.cycles import without_reuse
from orthrus.bench.records import output_digest
from orthrus.bench.runner import prompts_digest
from orthrus.cli.common import check_strategies
from orthrus.config import DecodeConfig, SamplingParams, Strategy
from orthrus.types import GenerationResult

FORMULAS = {
    "tokens_per_cycle": "(tokens - 1) / cycles, mean over prompts; own tokens included",
    "tokens_per_cycle_pooled": "sum of (tokens - 1) / sum of cycles",
    "tokens_per_forward": "sum of tokens / sum of passes, prefill included, both views counted",
    "tokens_per_forward_mean": "tokens / passes, mean over prompts",
    "rows_per_pass": "sum of rows of both views / sum of passes, both without the prefill",
    "acceptance_rate": "accepted drafts / judged drafts, pooled",
    "num_equal_to_ar": "prompts whose tokens equal those of ar (sampled: with the same seed)",
    "runs": "a value per prompt, in the order of the file; output: a digest of the new tokens",
}
DEFAULTS = DecodeConfig()


def main(
    files: Annotated[list[Path], typer.Argument(help="JSONL files with `prompt`, `turns` or `messages`.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file or 'default'.")] = "default",
    view: Annotated[str, typer.Option(help="View folder, 'default' or 'untrained'.")] = "default",
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="May be repeated. Left out: all but auto, whose choices depend on the clock."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher samples.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Prompt n samples with seed + n, whatever the strategy.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each file, from the top.")] = 40,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    node_budget: Annotated[int, typer.Option(min=1, help="Nodes of a tree.")] = DEFAULTS.node_budget,
    block_budget: Annotated[int, typer.Option(min=1, help="Blocks of a fused pass.")] = DEFAULTS.block_budget,
    floor: Annotated[bool, typer.Option(help="The AR row in the draft pass.")] = True,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write; what it holds is kept.")] = None,
) -> None:
    """Decode every prompt with every strategy; prints a line of JSON."""
    options = {
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "node_budget": node_budget,
        "block_budget": block_budget,
        "floor": floor,
    }
    chosen = check_strategies(strategy)
    sets = {file.stem: load_prompts(file)[:limit] for file in files}
    if len(sets) < len(files):
        raise typer.BadParameter("two files have the same name; results go by the names")
    orthrus = without_reuse(Orthrus.load(model, view, dtype, device))
    report = open_report(output, orthrus, options, sets)
    for which in chosen:
        for name, prompts in sets.items():
            if name in report["runs"].setdefault(which, {}):
                continue
            report["runs"][which][name] = measure(orthrus, f"{which}, {name}", which, prompts, options)
            report["results"] = results(report["runs"])
            if output is not None:
                write_text_atomic(output, compact_json(report) + "\n")
            typer.echo(f"{which}, {name}: {json.dumps(report['results'][which][name])}", err=True)
    line = {
        which: {name: round(row["tokens_per_forward"], 3) for name, row in rows.items()}
        for which, rows in report["results"].items()
    }
    typer.echo(json.dumps({"tokens_per_forward": line}))


def open_report(
    output: Path | None, orthrus: Orthrus, options: dict[str, Any], sets: dict[str, list[BenchPrompt]]
) -> dict[str, Any]:
    """The report so far, or a new one; refuses to mix models, views, options or prompts."""
    view = weights_fingerprint(orthrus.dual.view_parameters().items())
    about = {
        "options": options,
        "model": orthrus.describe() | {"view_fingerprint": view},
        "formulas": FORMULAS,
    }
    digests = {name: prompts_digest(prompts) for name, prompts in sets.items()}
    if output is None or not output.is_file():
        return {**about, "prompts": digests, "results": {}, "runs": {}}
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    kept = report.get("prompts", {})
    if any(report.get(key) != value for key, value in about.items()) or any(
        kept.get(name, digest) != digest for name, digest in digests.items()
    ):
        raise typer.BadParameter(
            f"{output} holds results of another model, view, options or prompts; name a new file"
        )
    report["prompts"] = kept | digests
    return report


def measure(
    orthrus: Orthrus, title: str, strategy: Strategy, prompts: list[BenchPrompt], options: dict[str, Any]
) -> dict[str, Any]:
    """Counts of every prompt, and where they come from."""
    counts: list[dict[str, Any]] = []
    with typer.progressbar(prompts, label=title, file=sys.stderr) as shown:
        for index, prompt in enumerate(shown):
            config = DecodeConfig(
                strategy=strategy,
                max_new_tokens=options["max_new_tokens"],
                node_budget=options["node_budget"],
                block_budget=options["block_budget"],
                floor=options["floor"],
                sampling=SamplingParams(temperature=options["temperature"], seed=options["seed"] + index),
            )
            prompt_ids = orthrus.base.encode_prompt(prompt.prompt)
            counts.append(_counts(orthrus.stream_ids(prompt_ids, config).drain()))
    columns = {key: [row[key] for row in counts] for key in counts[0]}
    about = orthrus.describe()
    made = provenance(device=about["device"], dtype=about["dtype"], seed=options["seed"])
    return {"provenance": made, **columns}


def _counts(result: GenerationResult) -> dict[str, Any]:
    s = result.stats
    return {
        "tokens": s.num_tokens,
        "cycles": s.num_cycles,
        "passes": s.num_passes,
        "prefill_passes": s.num_prefill_passes,
        "rows": s.num_rows,
        "drafted": s.num_drafted,
        "accepted": s.num_accepted,
        "output": output_digest(result.token_ids),
    }


def results(runs: dict[str, Any]) -> dict[str, Any]:
    """{strategy: {set: its numbers}}, as `FORMULAS` says."""
    return {
        strategy: {name: _numbers(run, runs.get("ar", {}).get(name)) for name, run in by_set.items()}
        for strategy, by_set in runs.items()
    }


def _numbers(run: dict[str, Any], ar: dict[str, Any] | None) -> dict[str, Any]:
    tokens, passes = run["tokens"], run["passes"]
    # An answer of one token has no cycle.
    per_cycle = [(t - 1) / c for t, c in zip(tokens, run["cycles"], strict=True) if c]
    numbers = {
        "num_prompts": len(tokens),
        "num_tokens": sum(tokens),
        "tokens_per_cycle": sum(per_cycle) / max(1, len(per_cycle)),
        "tokens_per_cycle_pooled": sum(t - 1 for t in tokens) / max(1, sum(run["cycles"])),
        "tokens_per_forward": sum(tokens) / sum(passes),
        "tokens_per_forward_mean": sum(t / p for t, p in zip(tokens, passes, strict=True)) / len(tokens),
        "rows_per_pass": sum(run["rows"]) / max(1, sum(passes) - sum(run["prefill_passes"])),
    }
    if sum(run["drafted"]):
        numbers["acceptance_rate"] = sum(run["accepted"]) / sum(run["drafted"])
    if ar is not None:
        numbers["num_equal_to_ar"] = sum(a == b for a, b in zip(run["output"], ar["output"], strict=True))
    return numbers


def compact_json(content: dict[str, Any]) -> str:
    """Indented, but a list of plain values on one line: there is one for every count."""
    text = json.dumps(content, indent=2)
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
