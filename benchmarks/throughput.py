"""Many requests at once: python benchmarks/throughput.py FILE.jsonl ... [--help]

The same prompts are answered 1, 2, 4, ... at a time, by plain decoding and by `auto` through the engine, by the
stock model's own `generate` over padded batches, and by llama.cpp with as many sequences, where it is there.
Arms take turns at each concurrency, repeat by repeat. Every answer has the same number of tokens, so that a
batch has no stragglers, which is the best case for `generate` and for llama.cpp; or lengths are drawn
(`--shortest`), as a server sees them. Then those two decode each batch up to its longest answer, and what lies
beyond the length of an answer does not count. Each place in the engine is filled several times, since a server's
places are too: in a single round the slowest request decides alone, and tokens that others save are lost. Leave
the machine alone meanwhile; --quick rehearses.
"""

import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from llama_side import LlamaSide, best_threads, default_gguf, usable_cores
from throughput_arms import Answered, Arm, Asked, llama_arm, our_arm, stock_arm

from orthrus.api import Orthrus
from orthrus.audit.explain import first_difference
from orthrus.base.bench_prompts import BenchPrompt, load_prompts
from orthrus.base.devices import synchronize
from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import installed_version, provenance
from orthrus.bench.runner import prompts_digest
from orthrus.bench.statistics import Spread

CONCURRENCY = (1, 2, 4, 8, 16, 32)
PRECISIONS = ("float32", "bfloat16", "int8", "int4")
OURS, STOCK, LLAMA = ("ar", "auto"), "transformers", "llama.cpp"
SETTLE_S = 0.02
Runs = dict[tuple[str, int], list[tuple[float, Answered]]]
"""By arm and concurrency: tokens a second of each repeat, and what came out."""
LEGEND = {
    "tokens_per_second": "new tokens of all requests / time from the first request handed in to the last token, "
    "prompts included; median (min..max) over repeats",
    "decoding": "of our arms: tokens / seconds of those passes that carry no rows of prompts; median (min..max)",
    "decoding_to_one": "decoding / that of the same arm with one request at a time, same repeat; median",
    "to_one": "tokens_per_second / that of the same arm with one request at a time, same repeat; median",
    "to_ar": "tokens_per_second / that of ar at the same concurrency and repeat; median",
    "to_transformers": "the same against the stock model's `generate` over left-padded batches of that size",
    "to_llama_cpp": "the same against llama.cpp, whose file (Q4_1) is the same whatever our precision",
    "num_requests": "prompts that were answered: options.requests, or options.rounds for each place where that is "
    "more",
    "num_equal": "requests whose tokens all equal those of ar at the lowest concurrency that answered them, same "
    "precision; of other programs for information",
    "tokens_per_pass": "of our arms: new tokens / passes of the engine, prompts included",
}


def main(
    files: Annotated[list[Path], typer.Argument(help="JSONL files of prompts.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file or 'default'.")] = "default",
    view: Annotated[str, typer.Option(help="View folder, 'default' or 'untrained'.")] = "default",
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help=f"May be repeated. Left out: {CONCURRENCY}.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help=f"May be repeated. Left out: {PRECISIONS}.")
    ] = None,
    runner: Annotated[str | None, typer.Option(help="As for Orthrus.load.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Prompts, from all files in turn, at least.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Prompts for each place, at least.")] = 4,
    longest: Annotated[int, typer.Option(min=1, help="Prompts of more tokens are passed over.")] = 400,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the longest answer.")] = 64,
    shortest: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of the shortest answer: lengths are drawn evenly, the same in each run. Left out: all "
            "are equally long.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each arm at each concurrency.")] = 3,
    stock: Annotated[bool, typer.Option(help="The stock model's generate beside ours.")] = True,
    llama: Annotated[bool, typer.Option(help="llama.cpp beside ours, where it is installed.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="A rehearsal: little of everything.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print a table and a line of JSON; the file is written after each precision."""
    levels, precisions = sorted(set(concurrency or CONCURRENCY)), precision or list(PRECISIONS)
    if quick:
        levels, requests, max_new_tokens, repeats = levels[:3], min(requests, 4), min(max_new_tokens, 8), 1
        shortest = shortest and min(shortest, max_new_tokens)
        precisions, rounds = precisions[:1], 1
    if shortest is not None and shortest > max_new_tokens:
        raise typer.BadParameter(f"--shortest {shortest} is more than --max-new-tokens {max_new_tokens}")
    asked = in_turn([load_prompts(file) for file in files])
    report: dict[str, Any] = {
        "kind": "orthrus-throughput",
        "legend": LEGEND,
        "results": [],
        "settings": {},
        "options": {
            "files": [file.name for file in files],
            "concurrency": levels,
            "requests": requests,
            "rounds": rounds,
            "max_new_tokens": max_new_tokens,
            "shortest": shortest,
            "repeats": repeats,
            "quick": quick,
        },
    }
    side: LlamaSide | None = None
    for name in precisions:
        typer.echo(f"loading {name}", err=True)
        orthrus = Orthrus.load(model, view, name, device, runner=runner)
        orthrus.time_passes()
        numbers = {level: max(requests, rounds * level) for level in levels}
        kept = chosen(orthrus, asked, max(numbers.values()), longest, max_new_tokens)
        prompts = [ids for _, ids in kept]
        lengths = drawn(len(prompts), shortest or max_new_tokens, max_new_tokens)
        arms = {strategy: our_arm(orthrus, strategy) for strategy in OURS}
        if stock:
            arms[STOCK] = stock_arm(orthrus)
        if llama and side is None and find_spec("llama_cpp"):
            side = LlamaSide(default_gguf(), max(map(len, prompts)) + max_new_tokens, max(levels))
            tried = best_threads(side, prompts[0], range(1, usable_cores() + 1), min(48, max_new_tokens))
            side.set_threads(max(tried, key=tried.__getitem__))
            report["llama_cpp"] = {"version": installed_version("llama-cpp-python"), "threads": tried}
        if side is not None:
            arms[LLAMA] = llama_arm(side)
        jobs = list(map(Asked, prompts, lengths))
        report["results"] += measure(name, arms, jobs, numbers, repeats, orthrus.dual.device)
        about = orthrus.describe()
        report["settings"][name] = about
        report["prompts"] = {
            "digest": prompts_digest([prompt for prompt, _ in kept]),
            "lengths": list(map(len, prompts)),
            "new_tokens": lengths,
        }
        report["provenance"] = provenance(
            device=about["device"], dtype=", ".join(report["settings"]), seed=None
        )
        kind = about["device"].split(":")[0]
        path = output or Path(__file__).parent / "results" / f"throughput-{kind}.json"
        write_text_atomic(path, json.dumps(report, indent=2) + "\n")
        del orthrus, arms
    if side is not None:
        side.close()
    typer.echo(table(report["results"]))
    line = {
        f"{row['precision']}, {row['arm']}, {row['concurrency']}": round(
            row["tokens_per_second"]["median"], 1
        )
        for row in report["results"]
    }
    typer.echo(json.dumps({"tokens_per_second": line}))


def in_turn(sets: Sequence[Sequence[BenchPrompt]]) -> list[BenchPrompt]:
    """The prompts of all files, one of each in turn."""
    most = max(map(len, sets))
    return [prompts[i] for i in range(most) for prompts in sets if i < len(prompts)]


def drawn(number: int, shortest: int, longest: int) -> list[int]:
    """Lengths of answers, the same each time."""
    draw = random.Random(0)
    return [draw.randint(shortest, longest) for _ in range(number)]


def chosen(
    orthrus: Orthrus, asked: list[BenchPrompt], number: int, longest: int, num_new: int
) -> list[tuple[BenchPrompt, list[int]]]:
    """The first prompts that are short enough, with their token ids."""
    longest = min(longest, orthrus.base.context_length - num_new)
    found = []
    for prompt in asked:
        ids = orthrus.base.encode_prompt(prompt.prompt)
        if len(ids) <= longest:
            found.append((prompt, ids))
        if len(found) == number:
            return found
    raise typer.BadParameter(f"{len(found)} prompts have at most {longest} tokens, and {number} are needed")


def measure(
    precision: str,
    arms: dict[str, Arm],
    asked: list[Asked],
    numbers: dict[int, int],
    repeats: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """A row for each arm and concurrency; numbers: requests to answer, by concurrency."""
    names, levels = list(arms), list(numbers)
    runs: Runs = {}
    for arm in arms.values():
        # Not timed: lazy initialisation, and memory that is taken for the first time.
        arm(asked[: numbers[levels[0]]], levels[-1])
    for repeat in range(repeats):
        for level in levels:
            shift = (repeat + levels.index(level)) % len(names)
            for name in names[shift:] + names[:shift]:
                # The threads of the arm before may still be spinning for more work.
                time.sleep(SETTLE_S)
                synchronize(device)
                started = time.perf_counter()
                answered = arms[name](asked[: numbers[level]], level)
                synchronize(device)
                speed = sum(map(len, answered.answers)) / (time.perf_counter() - started)
                runs.setdefault((name, level), []).append((speed, answered))
                typer.echo(f"{precision}, {level} at a time, {name}: {speed:.1f}/s", err=True)
    return [row(precision, name, level, runs, levels) for level in levels for name in names]


def row(precision: str, name: str, level: int, runs: Runs, levels: list[int]) -> dict[str, Any]:
    mine = [speed for speed, _ in runs[name, level]]
    found: dict[str, Any] = {
        "precision": precision,
        "arm": name,
        "concurrency": level,
        "tokens_per_second": asdict(Spread.of(mine)),
    }
    others = (("to_ar", "ar"), ("to_transformers", STOCK), ("to_llama_cpp", LLAMA))
    for key, other in (("to_one", (name, levels[0])), *((key, (arm, level)) for key, arm in others)):
        if other in runs and (key != "to_one" or levels[0] == 1):
            found[key] = median(a / b for a, (b, _) in zip(mine, runs[other], strict=True))
    decoding = decode_speeds(runs, name, level)
    if decoding:
        found["decoding"] = asdict(Spread.of(decoding))
        alone = decode_speeds(runs, name, levels[0])
        if levels[0] == 1 and len(alone) == len(decoding):
            found["decoding_to_one"] = median(a / b for a, b in zip(decoding, alone, strict=True))
    plain: list[tuple[int, ...]] = []
    for each in levels:
        plain += runs["ar", each][-1][1].answers[len(plain) :]
    last = runs[name, level][-1][1]
    mine_and_plain = list(zip(last.answers, plain, strict=False))
    found["num_requests"] = len(mine_and_plain)
    found["num_equal"] = sum(a == b for a, b in mine_and_plain)
    differ = {i: first_difference(a, b) for i, (a, b) in enumerate(mine_and_plain) if a != b}
    found["first_differences"] = differ
    found["output"] = hashlib.blake2b(repr(last.answers).encode(), digest_size=8).hexdigest()
    if last.num_passes:
        found["tokens_per_pass"] = sum(map(len, last.answers)) / last.num_passes
    return found


def decode_speeds(runs: Runs, name: str, level: int) -> list[float]:
    """Tokens a second of passes without prompts, by repeat; of other programs nothing is known."""
    return [each.decoded / each.decode_s for _, each in runs[name, level] if each.decode_s]


def table(results: list[dict[str, Any]]) -> str:
    head = ["precision", "at a time", "arm", "tokens/s", "to one", "to ar", "to transformers", "to llama.cpp"]
    lines = []
    for found in results:
        speed = found["tokens_per_second"]
        shown = f"{speed['median']:.1f} ({speed['low']:.1f}..{speed['high']:.1f})"
        ratios = [
            f"{found[key]:.2f}" if key in found else "–"
            for key in ("to_one", "to_ar", "to_transformers", "to_llama_cpp")
        ]
        equal = f"{found['num_equal']} of {found['num_requests']}"
        for key in ("decoding_to_one", "tokens_per_pass"):
            ratios.append(f"{found[key]:.2f}" if key in found else "–")
        lines.append([found["precision"], str(found["concurrency"]), found["arm"], shown, *ratios, equal])
    return markdown_table([*head, "decoding to one", "tokens/pass", "equal"], lines, "lrl" + "r" * 8)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
