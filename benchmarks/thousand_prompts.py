"""Greedy identity over a thousand prompts in four precisions: python benchmarks/thousand_prompts.py OUT.json [--help]

float32 against the stock model's own `generate`; bfloat16, int8 and int4 against plain decoding by the same
runner, bit for bit. Every chunk of prompts is one audit and is kept in OUT.json; the same command goes on
where it was stopped, and refuses a file of another model, view, commit of options or prompts.
"""

import gc
import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from many_prompts import PER_DOMAIN, records

from orthrus.api import Orthrus
from orthrus.audit import AuditOptions, run_audit
from orthrus.audit.full_report import bound
from orthrus.base.bench_prompts import BenchPrompt
from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import check_report, write_text_atomic
from orthrus.bench.runner import prompts_digest

DTYPES = ("float32", "bfloat16", "int8", "int4")
LEGEND = {
    "identical": "prompts whose tokens all equal the baseline's",
    "bound": "what the differences, or that there are none, say about the rate of them: Clopper-Pearson, 95 %",
    "near_ties": "differences that rounding explains; broken: those that it cannot (orthrus audit's rule)",
    "acceptance_rate": "accepted drafts / verified drafts",
    "tokens_per_forward": "sum of tokens / sum of passes, prefill, draft and verify",
    "chunks": "per dtype, per audit: its strategy line, its differences, and where they come from",
}


def main(
    output: Annotated[Path, typer.Argument(help="JSON file to write, and to go on with.")],
    per_domain: Annotated[
        int, typer.Option(min=1, max=84, help="Prompts of each of 12 domains.")
    ] = PER_DOMAIN,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated. Left out: all four.")] = None,
    model: Annotated[str, typer.Option(help="As in Orthrus.load.")] = "default",
    view: Annotated[str, typer.Option(help="As in Orthrus.load.")] = "default",
    strategy: Annotated[str, typer.Option(help="What is audited.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts that our side answers together.")] = 4,
    chunk: Annotated[int, typer.Option(min=1, help="Prompts of one audit: what a stop may cost.")] = 24,
) -> None:
    """Audit what is not in the file yet; prints the table and exits with 1 where the audit failed."""
    check_report(output)
    asked = [
        BenchPrompt(record.get("prompt") or record["messages"], record["domain"])
        for record in records(per_domain)
    ]
    options = {
        "model": model,
        "view": view,
        "strategy": strategy,
        "max_new_tokens": max_new_tokens,
        "concurrency": concurrency,
        "chunk": chunk,
        "per_domain": per_domain,
        "prompts": prompts_digest(asked),
    }
    report = opened(output, options)
    for name in dtype or DTYPES:
        done: list[dict[str, Any]] = report["chunks"].setdefault(name, [])
        orthrus: Orthrus | None = None
        for start in range(len(done) * chunk, len(asked), chunk):
            orthrus = orthrus or Orthrus.load(model, view, name)
            some = asked[start : start + chunk]
            settings = AuditOptions(
                prompts=some,
                strategies=(strategy,),  # type: ignore[arg-type]
                against="stock" if name == "float32" else "plain",
                max_new_tokens=max_new_tokens,
                concurrency=concurrency,
            )
            done.append(kept(run_audit(orthrus, settings).to_dict(), some, start))
            report["results"] = results(report["chunks"])
            write_text_atomic(output, json.dumps(report, indent=1) + "\n")
            typer.echo(f"{name}: {start + len(some)} of {len(asked)}, {done[-1]['summary']}", err=True)
        del orthrus
        gc.collect()
    header = ["dtype", "prompts", "identical", "near-ties", "broken", "tokens", "tokens per forward", "bound"]
    lines = [
        [
            name,
            *(
                str(r[key])
                for key in ("num_prompts", "num_identical", "num_near_ties", "num_broken", "num_tokens")
            ),
            f"{r['tokens_per_forward']:.2f}",
            r["bound"],
        ]
        for name, r in report["results"].items()
    ]
    typer.echo(markdown_table(header, lines))
    if not all(r["passed"] for r in report["results"].values()):
        raise typer.Exit(1)


def opened(output: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The report so far, or a new one; refuses to mix options or prompts."""
    if not output.is_file():
        return {
            "kind": "orthrus-thousand-prompts",
            "legend": LEGEND,
            "options": options,
            "results": {},
            "chunks": {},
        }
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    if report.get("options") != options:
        raise typer.BadParameter(f"{output} holds results of other options or prompts; name a new file")
    return report


def kept(audit: dict[str, Any], prompts: list[BenchPrompt], start: int) -> dict[str, Any]:
    """Of one audit: what is counted, and its differences with their place in the whole file."""
    different = {m["prompt_index"] for m in audit["mismatches"]}
    domains: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for index, prompt in enumerate(prompts):
        domains[prompt.domain][0] += 1
        domains[prompt.domain][1] += index not in different
    mismatches = [m | {"prompt_index": m["prompt_index"] + start} for m in audit["mismatches"]]
    names = ("passed", "summary", "model", "provenance", "damages", "faults")
    return {
        **{name: audit[name] for name in names},
        "counts": audit["strategies"][0],
        "mismatches": mismatches,
        "domains": domains,
    }


def results(chunks: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Sums over the chunks of each dtype, as `LEGEND` says."""
    found = {}
    for name, done in chunks.items():
        sums = {
            key: sum(c["counts"][key] for c in done)
            for key in ("num_prompts", "num_identical", "num_near_ties", "num_broken", "num_tokens")
        }
        passes = sum(c["counts"]["num_tokens"] / c["counts"]["tokens_per_forward"] for c in done)
        domains: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for c in done:
            for domain, (num, same) in c["domains"].items():
                domains[domain][0] += num
                domains[domain][1] += same
        found[name] = sums | {
            "passed": all(c["passed"] for c in done),
            "tokens_per_forward": sums["num_tokens"] / passes,
            "bound": bound(sums["num_prompts"] - sums["num_identical"], sums["num_prompts"], "outputs"),
            "identical_by_domain": {domain: f"{same} of {num}" for domain, (num, same) in domains.items()},
        }
    return found


if __name__ == "__main__":
    typer.run(main)
