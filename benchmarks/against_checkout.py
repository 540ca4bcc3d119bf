"""One request at a time, against another checkout: python benchmarks/against_checkout.py SRC FILE.jsonl ...

A process for each of the two checkouts answers the same prompts, by plain decoding and by `auto`. They take
turns prompt by prompt, and change places from repeat to repeat. Nothing is kept from one answer to the next.
Leave the machine alone meanwhile.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from statistics import geometric_mean, median
from typing import Annotated, Any

import typer
from other_process import served

OWN_SOURCE = Path(__file__).resolve().parents[1] / "src"
STRATEGIES = ("ar", "auto")
SETTLE_S = 0.02
LEGEND = {
    "ratio": "time of the reference / ours for the same prompt in the same repeat, prompt included; median over "
    "repeats, geometric mean over prompts (above 1: ours is faster)",
    "by_prompt": "the same before the mean",
    "tokens_per_second": "new tokens / time of ours; median over repeats of the sums over prompts",
    "num_equal": "prompts whose tokens are the same in both checkouts and in all repeats",
}


def main(
    reference: Annotated[Path, typer.Argument(help="The src folder of the other checkout.")],
    files: Annotated[list[Path], typer.Argument(help="JSONL files of prompts: a set each.")],
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Of each set, spread over it.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer at most.")] = 96,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    serve: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, print a line for each set, keep the result."""
    if serve is not None:
        answer_requests(serve, max_new_tokens)
        return
    from orthrus.base.bench_prompts import load_prompts
    from orthrus.base.outputs import write_text_atomic
    from orthrus.base.provenance import provenance

    sets = {file.stem: [p.prompt for p in spread(load_prompts(file), prompts)] for file in files}
    dtypes = dtype or ["float32", "bfloat16", "int8"]
    report: dict[str, Any] = {
        "kind": "orthrus-against-checkout",
        "legend": LEGEND,
        "options": {"max_new_tokens": max_new_tokens, "repeats": repeats, "prompts": prompts},
        "reference": commit_of(reference),
        "results": [],
    }
    path = output or Path(__file__).parent / "results" / "against-checkout-cpu.json"
    for name in dtypes:
        report["results"] += measure(reference, name, sets, max_new_tokens, repeats)
        report["provenance"] = provenance(device="cpu", dtype=", ".join(dtypes), seed=None)
        write_text_atomic(path, json.dumps(report, indent=2) + "\n")
    for row in report["results"]:
        typer.echo(
            f"{row['dtype']:9} {row['strategy']:5} {row['set']:12} {row['ratio']:.3f} "
            f"{row['tokens_per_second']:6.1f}/s equal {row['num_equal']} of {len(row['by_prompt'])}"
        )


def answer_requests(dtype: str, max_new_tokens: int) -> None:
    """For each [prompt, strategy] on stdin: milliseconds, tokens and a digest of them."""
    from orthrus.api import Orthrus

    try:
        from orthrus.engine.engine import EngineConfig

        orthrus = Orthrus.load(dtype=dtype, engine=EngineConfig(reuse=False))
    except ImportError:
        # The checkout has no engine yet, and so nothing that it would keep.
        orthrus = Orthrus.load(dtype=dtype)
    for strategy in (*STRATEGIES, *STRATEGIES):
        orthrus.generate("Why is the sky blue?", strategy=strategy, max_new_tokens=16, temperature=0.0)
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, strategy = json.loads(line)
        started = time.perf_counter()
        found = orthrus.generate(prompt, strategy=strategy, max_new_tokens=max_new_tokens, temperature=0.0)
        elapsed = (time.perf_counter() - started) * 1e3
        print(json.dumps([elapsed, len(found.token_ids), hash(tuple(found.token_ids))]), flush=True)


def measure(
    reference: Path, dtype: str, sets: dict[str, list[Any]], max_new_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """A row for each strategy and set."""
    rows = []
    with ExitStack() as stack:
        # One after another: they compile and time the machine where nothing is kept yet.
        arms = [
            stack.enter_context(other_process(source, dtype, max_new_tokens))
            for source in (OWN_SOURCE, reference)
        ]
        found: dict[tuple[str, str, int], list[list[list[Any]]]] = {}
        for repeat in range(repeats):
            for name, asked in sets.items():
                for i, prompt in enumerate(asked):
                    for strategy in STRATEGIES:
                        answers: list[Any] = [None, None]
                        for arm in (0, 1) if (repeat + i) % 2 else (1, 0):
                            time.sleep(SETTLE_S)
                            answers[arm] = arms[arm](json.dumps([prompt, strategy]))
                        found.setdefault((strategy, name, i), []).append(answers)
                typer.echo(f"{dtype}, repeat {repeat + 1} of {repeats}, {name}", err=True)
    for strategy in STRATEGIES:
        for name, asked in sets.items():
            mine = [found[strategy, name, i] for i in range(len(asked))]
            ratios = [median(theirs[0] / ours[0] for ours, theirs in each) for each in mine]
            speeds = [
                1e3 * sum(each[r][0][1] for each in mine) / sum(each[r][0][0] for each in mine)
                for r in range(repeats)
            ]
            equal = [len({answer[2] for pair in each for answer in pair}) == 1 for each in mine]
            rows.append(
                {
                    "dtype": dtype,
                    "strategy": strategy,
                    "set": name,
                    "ratio": geometric_mean(ratios),
                    "by_prompt": ratios,
                    "tokens_per_second": median(speeds),
                    "num_equal": sum(equal),
                }
            )
    return rows


def spread(prompts: Sequence[Any], number: int) -> list[Any]:
    """So many of them, evenly spaced."""
    return [prompts[i * len(prompts) // number] for i in range(min(number, len(prompts)))]


def commit_of(source: Path) -> str:
    """The commit that the folder is checked out at."""
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def other_process(
    source: Path, dtype: str, max_new_tokens: int
) -> AbstractContextManager[Callable[[str], Any]]:
    """A process of that checkout; called with a line of JSON, [prompt, strategy], it answers."""
    # One hash for the same tokens.
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONHASHSEED": "0"}
    arguments = [__file__, str(source), "none", "--serve", dtype, "--max-new-tokens", str(max_new_tokens)]
    return served(arguments, environment)


if __name__ == "__main__":
    typer.run(main)
