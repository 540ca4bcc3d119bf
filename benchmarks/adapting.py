"""What `orthrus adapt` wins on narrow traffic, and that noise changes nothing: python benchmarks/adapting.py [--help]

Both logs are made here, with a seed. The narrow one is what one assistant of a shop is asked: short requests of four
kinds, without answers, so that the base answers them. The lines of the noise log end with answers of random words.
A stopped run goes on with the same command.
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Annotated, Any

import typer

from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance

NAMES = (
    "Ms Alder",
    "Mr Birch",
    "Dr Cedar",
    "Ms Elm",
    "Mr Fir",
    "Ms Hazel",
    "Mr Larch",
    "Dr Maple",
    "Ms Oak",
    "Mr Pine",
)
ITEMS = (
    "kettle",
    "desk lamp",
    "backpack",
    "coffee grinder",
    "garden chair",
    "phone case",
    "rug",
    "bookshelf",
)
PROBLEMS = (
    "arrived late",
    "arrived broken",
    "has the wrong colour",
    "does not switch on",
    "is missing a part",
)
KINDS = (
    "Write a short and polite email to {name}, whose {item} {problem}. Say sorry and offer a refund.",
    "A customer named {name} says that the {item} {problem}. List three steps that our support should take.",
    "Write a product description of our {item} for the web shop, in three sentences.  Begin with: Dear {name}.",
    "Summarise this ticket in one sentence: {name} wrote on order {order} that the {item} {problem} and asks for help.",
)
FORMULAS = {
    "tokens_per_cycle": "(tokens - 1) / cycles, pooled over the requests held back, or over the built-in prompts "
    "(general); the AR view's own tokens included; chain, greedy",
    "gain": "new / old - 1; gain_low: the lower end of 95 % of resamplings of the requests",
    "cpu_seconds": "of the whole command: decodes before and after, answers, training",
    "unchanged": "every file of the served view has the digest that it had before",
}


def narrow_log(count: int, seed: int) -> list[dict[str, Any]]:
    random = Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        text = random.choice(KINDS).format(
            name=random.choice(NAMES),
            item=random.choice(ITEMS),
            problem=random.choice(PROBLEMS),
            order=random.randrange(1000, 10_000),
        )
        found[text] = None
    return [{"messages": [{"role": "user", "content": text}]} for text in found]


def noise_log(count: int, seed: int) -> list[dict[str, Any]]:
    random = Random(seed)

    def words(number: int) -> str:
        return " ".join(
            "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 9)))
            for _ in range(number)
        )

    return [
        {
            "messages": [
                {"role": "user", "content": f"{request['messages'][0]['content']} {words(2)}"},
                {"role": "assistant", "content": words(60)},
            ]
        }
        for request in narrow_log(count, seed)
    ]


LOGS = {"narrow": narrow_log, "noise": noise_log}


def main(
    output: Annotated[Path, typer.Argument(help="The result file, JSON.")],
    work: Annotated[Path, typer.Option(help="Where logs and views go.")] = Path("runs/adapting"),
    requests: Annotated[int, typer.Option(min=20, help="Lines of each log; a fifth is held back.")] = 200,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    epochs: Annotated[float, typer.Option(help="Passes over the requests.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Of logs, split and training.")] = 0,
) -> None:
    """Adapt the shipped view to both logs."""
    work.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, made in LOGS.items():
        log = work / f"{name}.jsonl"
        write_text_atomic(log, "".join(json.dumps(line) + "\n" for line in made(requests, seed)))
        options = ["--epochs", str(epochs), "--dtype", dtype, "--seed", str(seed)]
        results[name] = _adapted(log, work / f"view-{name}", options)
        typer.echo(f"{name}: {json.dumps(results[name])}", err=True)
    report = {
        "results": results,
        "formulas": FORMULAS,
        "options": {"requests": requests, "dtype": dtype, "epochs": epochs},
        "provenance": provenance(device="cpu", dtype=dtype, seed=seed),
    }
    write_text_atomic(output, json.dumps(report, indent=2) + "\n")


def adapt(log: Path, view: Path, *options: str) -> dict[str, Any]:
    """What `orthrus adapt` reports of a log, run as a user runs it."""
    command = [
        sys.executable,
        "-m",
        "orthrus.cli.app",
        "adapt",
        str(log),
        "--view",
        str(view),
        "--json",
        *options,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


def _adapted(log: Path, view: Path, options: list[str]) -> dict[str, Any]:
    before, used = _digests(view), resource.getrusage(resource.RUSAGE_CHILDREN)
    started = perf_counter()
    report = adapt(log, view, *options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    paths = ("view", "old_view")
    return {key: value for key, value in report.items() if key not in paths} | {
        "unchanged": _digests(view) == before,
        "seconds": round(perf_counter() - started, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime, 1),
        "processor_threads": len(os.sched_getaffinity(0)),
    }


def _digests(view: Path) -> dict[str, str]:
    if not view.is_dir():
        return {}
    return {file.name: hashlib.blake2b(file.read_bytes()).hexdigest() for file in sorted(view.iterdir())}


if __name__ == "__main__":
    typer.run(main)
