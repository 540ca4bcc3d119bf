"""The tables of docs/study.md, from the study's result file."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from study_arms import ARMS, BASE, Arm

from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import write_text_atomic

BEGIN, END = "<!-- begin: benchmarks/study.py render -->", "<!-- end -->"
RESAMPLES = 10_000


def render(
    result: Annotated[Path, typer.Argument(help="The result file.")] = Path(
        "benchmarks/results/study-cpu.json"
    ),
    page: Annotated[Path, typer.Option(help="The page with the two marker lines.")] = Path("docs/study.md"),
) -> None:
    """Write the tables between the page's markers."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    tables = study_tables(json.loads(result.read_text(encoding="utf-8")))
    write_text_atomic(page, f"{head}{BEGIN}\n\n{tables}\n{END}{tail}")


def study_tables(report: dict[str, Any]) -> str:
    """A Markdown table a question; differences are paired over prompts, with 95 % bootstrap intervals."""
    arms = report["arms"]
    base_prompts = arms[BASE]["scores_by_denoising_steps"]["1"]
    lines: list[str] = []
    for question in dict.fromkeys(arm.question for arm in ARMS if arm.question):
        rows = [_row(arms[BASE], "1", ARMS[0].label + " (base)", base_prompts)]
        if question == "Denoising steps":
            rows.append(_row(arms[BASE], "2", "the same view, two steps", base_prompts))
        for arm in (a for a in ARMS if a.question == question and a.name in arms):
            rows += [
                _row(arms[arm.name], steps, _label(arm, steps), base_prompts)
                for steps in arms[arm.name]["scores_by_denoising_steps"]
            ]
        if len(rows) > 1:
            lines += [f"### {question}", "", markdown_table(_HEADER, rows, "lrrrrr"), ""]
    return "\n".join(lines)


_HEADER = (
    "arm",
    "tokens per cycle",
    "against base",
    "tokens per forward",
    "targets",
    "trained parameters",
)


def _label(arm: Arm, steps: str) -> str:
    return (
        f"{arm.label}, {'one step' if steps == '1' else 'two steps'}"
        if len(arm.denoising_steps) > 1
        else arm.label
    )


def _row(arm: dict[str, Any], steps: str, label: str, base_prompts: list[dict[str, Any]]) -> list[str]:
    prompts = arm["scores_by_denoising_steps"][steps]
    tokens = sum(p["tokens"] for p in prompts)
    forward = tokens / sum(p["passes"] for p in prompts)
    difference = "" if prompts is base_prompts else _difference(prompts, base_prompts)
    return [
        label,
        f"{_tokens_per_cycle(prompts):.2f}",
        difference,
        f"{forward:.2f}",
        f"{arm['targets']:,}",
        f"{arm['view_parameters'] / 1e6:.1f} M",
    ]


def _tokens_per_cycle(prompts: list[dict[str, Any]]) -> float:
    return float(sum(p["tokens"] - 1 for p in prompts) / sum(p["cycles"] for p in prompts))


def _difference(prompts: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Pooled tokens per cycle less the base's, and the interval over resampled prompts."""
    mine, theirs = (np.array([[p["tokens"] - 1, p["cycles"]] for p in part]) for part in (prompts, base))
    picks = np.random.default_rng(0).integers(len(base), size=(RESAMPLES, len(base)))
    sums, base_sums = mine[picks].sum(1), theirs[picks].sum(1)
    low, high = np.percentile(sums[:, 0] / sums[:, 1] - base_sums[:, 0] / base_sums[:, 1], [2.5, 97.5])
    value = _tokens_per_cycle(prompts) - _tokens_per_cycle(base)
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
