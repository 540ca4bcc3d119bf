"""`auto` over plain decoding in wall clock, task by task: python benchmarks/spec_bench.py FILE.jsonl [--help]

One request at a time; `auto` with copies and without. The arms take turns on each prompt, repeat by repeat, and
a ratio is of two runs of the same prompt in the same repeat. Leave the machine alone meanwhile; --quick
rehearses.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Annotated, Any

import numpy as np
import typer

from orthrus.api import Orthrus, decode_config
from orthrus.base.bench_prompts import load_prompts
from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.bench.cycles import without_reuse
from orthrus.bench.runner import prompts_digest

PLAIN = "ar"
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {"strategy": "ar"},
    "auto": {"strategy": "auto", "copies": True},
    "auto without copies": {"strategy": "auto", "copies": False},
}
ALL, NUM_DRAWS, SETTLE_S = "all", 10_000, 0.02
LEGEND = {
    "speedup": "time of ar / time of the arm, whole answers, prompt included, same prompt and repeat; median over "
    "repeats; then geometric mean over the prompts of a task; all: over all prompts",
    "interval": "95 % of the bootstrap of that mean over prompts (percentiles of 10,000 draws, seed 0)",
    "decode_speedup": "the same of the time after the first token",
    "slower": "prompts whose speedup is below 1",
    "tokens_per_pass": "sum of tokens / sum of passes, prompts' passes included, over prompts and repeats",
    "tokens_per_second": "sum of tokens / sum of time; median over repeats",
    "num_equal": "prompts whose tokens equal those of ar in every repeat",
    "runs": "by task: arm, prompt and repeat; output: a digest of the new tokens",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One answer; times in ms."""

    output: str
    num_tokens: int
    num_passes: int
    ttft_ms: float
    decode_ms: float

    @property
    def total_ms(self) -> float:
        return self.ttft_ms + self.decode_ms


Task = dict[str, list[list[Run]]]
"""By arm: prompts, and their repeats."""


def main(
    file: Annotated[Path, typer.Argument(help="JSONL file of prompts, each with its domain: the task.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file or 'default'.")] = "default",
    view: Annotated[str, typer.Option(help="View folder, 'default' or 'fresh'.")] = "default",
    dtype: Annotated[str | None, typer.Option(help="As for Orthrus.load.")] = None,
    runner: Annotated[str | None, typer.Option(help="As for Orthrus.load.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    domain: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 10,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="The longest answer.")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds of each prompt.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A rehearsal: little of everything.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print a table and a line of JSON; the file is written after each prompt."""
    if quick:
        limit, max_new_tokens, repeats = 1, min(max_new_tokens, 12), 1
    asked = load_prompts(file, tuple(domain or ()), limit)
    orthrus = without_reuse(Orthrus.load(model, view, dtype, device, runner=runner))
    orthrus.time_passes()
    about = orthrus.describe()
    room = orthrus.base.context_length - max_new_tokens
    ids = [orthrus.base.encode_prompt(prompt.prompt) for prompt in asked]
    fitting = [(prompt, i) for prompt, i in zip(asked, ids, strict=True) if len(i) <= room]
    if not fitting:
        raise typer.BadParameter(f"no prompt has at most {room} tokens")
    name = f"spec-bench-{about['dtype']}-{about['device'].split(':')[0]}.json"
    path = output or Path(__file__).parent / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Task] = {}
    for keywords in ARMS.values():
        answer(orthrus, fitting[0][1], 16, keywords)
    for number, (prompt, prompt_ids) in enumerate(fitting):
        task = runs.setdefault(prompt.domain, {name: [] for name in ARMS})
        for rows in task.values():
            rows.append([])
        for repeat in range(repeats):
            shift = (number + repeat) % len(ARMS)
            names = list(ARMS)
            for name in names[shift:] + names[:shift]:
                time.sleep(SETTLE_S)
                task[name][-1].append(answer(orthrus, prompt_ids, max_new_tokens, ARMS[name]))
        shown = {name: f"{speedup(task, name, -1):.2f}" for name in ARMS if name != PLAIN}
        typer.echo(f"{number + 1} of {len(fitting)}, {prompt.domain}: {shown}", err=True)
        report = {
            "kind": "orthrus-spec-bench",
            "legend": LEGEND,
            "results": summarise(runs),
            "arms": ARMS,
            "model": about,
            "options": {"max_new_tokens": max_new_tokens, "repeats": repeats, "limit": limit, "quick": quick},
            "prompts": {
                "digest": prompts_digest([p for p, _ in fitting]),
                "lengths": [len(i) for _, i in fitting],
                "passed_over": len(asked) - len(fitting),
            },
            "provenance": provenance(device=about["device"], dtype=about["dtype"], seed=None),
            "runs": {
                name: {arm: [[asdict(run) for run in row] for row in rows] for arm, rows in task.items()}
                for name, task in runs.items()
            },
        }
        write_text_atomic(path, json.dumps(report, indent=2) + "\n")
    results = summarise(runs)
    typer.echo(table(results))
    typer.echo(json.dumps({"speedup": {task: round(r["auto"]["speedup"], 3) for task, r in results.items()}}))


def answer(orthrus: Orthrus, prompt_ids: list[int], num_new: int, keywords: dict[str, Any]) -> Run:
    result = orthrus.stream_ids(prompt_ids, decode_config(max_new_tokens=num_new, **keywords)).drain()
    digest = hashlib.blake2b(repr(result.token_ids).encode(), digest_size=8).hexdigest()
    s = result.stats
    return Run(digest, s.num_tokens, s.num_passes, s.ttft_ms, s.decode_ms)


def speedup(task: Task, arm: str, prompt: int, *, decode: bool = False) -> float:
    """Of one prompt: paired by repeat, median over repeats."""

    def ms(run: Run) -> float:
        return run.decode_ms if decode else run.total_ms

    pairs = zip(task[PLAIN][prompt], task[arm][prompt], strict=True)
    # An answer of one token has no time after it.
    return median(ms(plain) / ms(run) if ms(run) and ms(plain) else 1.0 for plain, run in pairs)


def summarise(runs: dict[str, Task]) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {arm: its numbers}}, as `LEGEND` says; all tasks together last."""
    every: Task = {name: [row for task in runs.values() for row in task[name]] for name in ARMS}
    return {name: {arm: numbers(task, arm) for arm in ARMS} for name, task in (*runs.items(), (ALL, every))}


def numbers(task: Task, arm: str) -> dict[str, Any]:
    rows = task[arm]
    flat = [run for row in rows for run in row]
    speeds = [speedup(task, arm, prompt) for prompt in range(len(rows))]
    draws = np.random.default_rng(0).choice(np.log(speeds), (NUM_DRAWS, len(speeds)))
    low, high = np.exp(np.percentile(draws.mean(axis=1), [2.5, 97.5]))
    repeats = list(zip(*rows, strict=True))
    return {
        "num_prompts": len(rows),
        "speedup": geometric_mean(speeds),
        "interval": [float(low), float(high)],
        "decode_speedup": geometric_mean(speedup(task, arm, i, decode=True) for i in range(len(rows))),
        "slower": sum(value < 1.0 for value in speeds),
        "tokens_per_pass": sum(run.num_tokens for run in flat) / sum(run.num_passes for run in flat),
        "tokens_per_second": median(
            1e3 * sum(run.num_tokens for run in part) / sum(run.total_ms for run in part) for part in repeats
        ),
        "num_equal": sum(
            {run.output for run in mine} == {run.output for run in plain}
            for mine, plain in zip(rows, task[PLAIN], strict=True)
        ),
        "by_prompt": speeds,
    }


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = []
    for task, by_arm in results.items():
        for arm, row in by_arm.items():
            low, high = row["interval"]
            lines.append(
                [
                    task,
                    arm,
                    str(row["num_prompts"]),
                    f"{row['tokens_per_second']:.1f}",
                    f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]",
                    f"{row['decode_speedup']:.2f}",
                    str(row["slower"]),
                    f"{row['tokens_per_pass']:.2f}",
                    f"{row['num_equal']} of {row['num_prompts']}",
                ]
            )
    head = [
        "task",
        "arm",
        "prompts",
        "tokens/s",
        "speed-up [95 %]",
        "decode",
        "slower",
        "tokens/pass",
        "equal",
    ]
    return markdown_table(head, lines, "ll" + "r" * 7)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
