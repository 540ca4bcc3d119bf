"""Our own view unverified, beside the base and Orthrus: python benchmarks/sceptic.py GSM8K.jsonl HUMANEVAL.jsonl

"A full diffusion transformer would be a lot faster still": here every draft is taken as it is, so a pass
commits a whole block, and the answers are graded. In this benchmark only: the library has no such way.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import comb
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer
from code_answers import number_is_right, passes, program

from orthrus.api import Orthrus, decode_config
from orthrus.audit.chances import largest_rate
from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import check_report, write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.bench.cycles import without_reuse
from orthrus.decoding.tree import DraftTree
from orthrus.engine import work

ARMS = {"base": "ar", "orthrus": "fused_tree", "unverified": "fused"}
LEGEND = {
    "base": "strategy ar; orthrus: fused_tree, verified; unverified: fused, one block a pass, every draft taken",
    "tokens_per_pass": "sum of new tokens / sum of passes, prompts' passes included. The AR rows that write an "
    "unverified block into the cache ride on the next block's pass, and decide the one token after it",
    "num_prompts": "from the top of each file; those without an answer or tests to grade by are left out",
    "accuracy": "right answers / prompts; interval: 95 % (Clopper-Pearson). GSM8K: the boxed or last number; "
    "HumanEval: the task's tests pass, greedy, one answer",
    "identical": "prompts whose tokens all equal the base's",
    "mcnemar": "right only with the base, right only with this arm, and the exact two-sided p of McNemar's test",
}
NEEDED = {"gsm8k": ("turns", "answer"), "humaneval": ("turns", "prompt", "entry_point", "test")}
PUBLISHED = (
    "Published losses of diffusion decoding stand in the papers of Dream, SDAR and Fast-dLLM v2 (11 points on "
    "MATH-500, as issue 21 of this project quotes it); other models and sizes, so only the direction compares."
)


@contextmanager
def unverified() -> Iterator[None]:
    """While inside, a draft stands whatever the AR view says, and the next block follows its end."""

    def whole(tree: DraftTree, own_ids: Sequence[int]) -> list[int]:
        return tree.paths()[-1] if tree.num_nodes else []

    def behind(drafts: DraftTree, num_blocks: int, max_depth: int, *, at_root: bool) -> list[int]:
        return [drafts.num_nodes] if num_blocks and drafts.num_nodes <= max_depth else []

    with ExitStack() as stack:
        stack.enter_context(patch.object(work, "accepted_rows", whole))
        stack.enter_context(patch.object(work, "block_rows", behind))
        yield


Runs = dict[str, dict[str, list[dict[str, Any]]]]
"""Answers of each file, by arm."""


def main(
    gsm8k: Annotated[Path, typer.Argument(help="JSONL with turns and answer.")],
    humaneval: Annotated[Path, typer.Argument(help="JSONL with turns, prompt, entry_point and test.")],
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("sceptic.json"),
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each file, from the top.")] = 100,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 320,
    model: Annotated[str, typer.Option(help="As in Orthrus.load.")] = "default",
    view: Annotated[str, typer.Option(help="As in Orthrus.load.")] = "default",
    dtype: Annotated[str | None, typer.Option(help="As in Orthrus.load.")] = None,
) -> None:
    """Answer, grade, print a table; runs code that the model wrote (see `code_answers.passes`)."""
    check_report(output)
    files = {"gsm8k": gsm8k, "humaneval": humaneval}
    tasks = {name: graded(file, NEEDED[name])[:limit] for name, file in files.items()}
    orthrus = without_reuse(Orthrus.load(model, view, dtype))
    about = orthrus.describe()
    options = {
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "arms": ARMS,
        "tasks": digest_of(tasks),
        "model": about,
    }
    # What a run that was stopped has answered; the same command goes on with it.
    kept = output.with_suffix(".part.json")
    runs = answered(kept, options) or {name: {arm: [] for arm in ARMS} for name in tasks}
    for name, some in tasks.items():
        done = len(runs[name]["base"])
        for number, task in enumerate(some[done:], done + 1):
            answers = {arm: answer(orthrus, arm, name, task, max_new_tokens) for arm in ARMS}
            for arm, found in answers.items():
                runs[name][arm].append(found)
            write_text_atomic(kept, json.dumps({"options": options, "runs": runs}) + "\n")
            typer.echo(f"{name}: {number} of {len(some)}", err=True)
    report = {
        "kind": "orthrus-sceptic",
        "legend": LEGEND,
        "published": PUBLISHED,
        "results": {
            name: {arm: summary(by_arm[arm], by_arm["base"]) for arm in ARMS} for name, by_arm in runs.items()
        },
        "options": {name: options[name] for name in ("limit", "max_new_tokens", "arms", "tasks")},
        "model": about,
        "provenance": provenance(device=about["device"], dtype=about["dtype"], seed=None),
        "runs": runs,
    }
    write_text_atomic(output, json.dumps(report, indent=1) + "\n")
    kept.unlink(missing_ok=True)
    typer.echo(table(report["results"]))


def digest_of(tasks: dict[str, list[dict[str, Any]]]) -> str:
    """A name for what is asked: answers to other tasks are not gone on with."""
    return hashlib.sha256(json.dumps(tasks).encode()).hexdigest()[:16]


def answered(kept: Path, options: dict[str, Any]) -> Runs | None:
    """What a stopped run with these options has answered; None where there is no such run."""
    part = json.loads(kept.read_text()) if kept.is_file() else {}
    return part["runs"] if part.get("options") == options else None


def graded(file: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The tasks of a JSONL file that have all that grading takes."""
    tasks = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = [task for task in tasks if all(name in task for name in needed)]
    if not found:
        raise typer.BadParameter(f"no task of {file} has {', '.join(needed)}")
    return found


def answer(orthrus: Orthrus, arm: str, name: str, task: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """One answer and whether it is right."""
    config = decode_config(
        strategy=ARMS[arm],  # type: ignore[arg-type]
        max_new_tokens=num_tokens,
        copies=False,
        block_budget=1 if arm == "unverified" else 3,
    )
    ids = orthrus.base.encode_prompt(task["turns"][0])
    with unverified() if arm == "unverified" else ExitStack():
        result = orthrus.stream_ids(ids, config).drain()
    right = (
        number_is_right(result.text, task["answer"])
        if name == "gsm8k"
        else passes(program(result.text, task))
    )
    stats = result.stats
    return {"right": right, "tokens": stats.num_tokens, "passes": stats.num_passes, "text": result.text,
            "ids": list(result.token_ids)}  # fmt: skip


def summary(mine: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """As `LEGEND` says."""
    num, right = len(mine), sum(run["right"] for run in mine)
    only_base = sum(b["right"] and not m["right"] for m, b in zip(mine, base, strict=True))
    only_mine = sum(m["right"] and not b["right"] for m, b in zip(mine, base, strict=True))
    return {
        "num_prompts": num,
        "tokens_per_pass": sum(run["tokens"] for run in mine) / sum(run["passes"] for run in mine),
        "num_right": right,
        "accuracy": right / num,
        "interval": [1 - largest_rate(num - right, num, 0.975), largest_rate(right, num, 0.975)],
        "identical": sum(m["ids"] == b["ids"] for m, b in zip(mine, base, strict=True)),
        "mcnemar": {"only_base": only_base, "only_this": only_mine, "p": mcnemar(only_base, only_mine)},
    }


def mcnemar(one: int, other: int) -> float:
    """The exact two-sided p-value: both kinds of discordant pairs are equally likely."""
    num, least = one + other, min(one, other)
    return min(1.0, 2 * sum(comb(num, k) for k in range(least + 1)) / 2**num)


def table(results: dict[str, dict[str, Any]]) -> str:
    header = ["data", "arm", "prompts", "tokens per pass", "accuracy", "95 %", "identical to base", "McNemar"]
    lines = [
        [name, arm, str(r["num_prompts"]), f"{r['tokens_per_pass']:.2f}", f"{r['accuracy']:.1%}",
         f"{r['interval'][0]:.1%} to {r['interval'][1]:.1%}", f"{r['identical']} of {r['num_prompts']}",
         f"{r['mcnemar']['only_base']} : {r['mcnemar']['only_this']}, p {r['mcnemar']['p']:.2g}"]
        for name, arms in results.items() for arm, r in arms.items()
    ]  # fmt: skip
    return markdown_table(header, lines)


if __name__ == "__main__":
    typer.run(main)
