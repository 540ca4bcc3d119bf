"""What other programs on the machine do to Orthrus: python benchmarks/busy_neighbour.py [--help]

One process for each import order, with nothing set in its environment, answers the same prompts again and
again: alone, beside a process that keeps a core busy, and beside two. Everything takes turns in one run,
repeat by repeat. Run it on a machine that does nothing else.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from other_process import served

ORDERS = ("orthrus first", "torch first")
WORK = ("ar", "auto", "prompt")
NEIGHBOURS = (0, 1, 2)
SPIN = "while True: pass"
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_DYNAMIC", "OMP_THREAD_LIMIT", "GOMP_SPINCOUNT")
PROMPTS = (
    "Why is the sky blue, and why is it red in the evening?",
    "Write a Python function that sorts a list.",
)
LONG_PROMPT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40
SETTLE_S = 0.2
"""From the start of the neighbours to the first measurement beside them."""

LEGEND = {
    "ms": "time of the same answers (ar, auto) or of a first token (prompt); median (min..max) over repeats",
    "busy_over_quiet": "time beside so many busy processes / alone in the same repeat; median (min..max)",
    "ar_over_auto": "time of plain decoding / of auto, beside as many, in the same repeat; median (min..max)",
    "over_reference": "time / that of the reference sources in the same repeat; median (min..max)",
}


class Arm(NamedTuple):
    """A process that answers: what it imports first, and the folder of the package that it runs."""

    order: str
    source: Path

    def __str__(self) -> str:
        return self.order if self.source == OWN_SOURCE else f"{self.order}, reference"


Ask = Callable[[str], Any]
OWN_SOURCE = Path(__file__).resolve().parents[1] / "src"


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file or 'default'.")] = "default",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, int8 or int4.")] = "bfloat16",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of everything.")] = 7,
    reference: Annotated[
        Path | None, typer.Option(help="The src folder of another checkout, measured side by side.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    serve: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, print a table and a line of JSON, keep the result."""
    if serve is not None:
        answer_requests(serve, model, dtype, max_new_tokens)
        return
    from orthrus.base.outputs import write_text_atomic

    sources = [OWN_SOURCE, *([] if reference is None else [reference.resolve()])]
    arms = [Arm(order, source) for source in sources for order in ORDERS]
    report = measure(arms, model, dtype, max_new_tokens, repeats)
    path = output or Path(__file__).parent / "results" / f"busy-neighbour-{dtype}-cpu.json"
    write_text_atomic(path, json.dumps(report, indent=2) + "\n")
    typer.echo(to_markdown(report))
    line = {
        f"{row['arm']}, {row['work']}, {row['neighbours']}": round(row["busy_over_quiet"]["median"], 3)
        for row in report["results"]
        if row["neighbours"]
    }
    typer.echo(json.dumps({"busy_over_quiet": line}))


def answer_requests(order: str, model: str, dtype: str, max_new_tokens: int) -> None:
    """For each line of stdin, do that work and print its milliseconds and a digest of its tokens."""
    if order == "torch first":
        import torch  # noqa: F401
    from orthrus.api import Orthrus

    orthrus = Orthrus.load(model, dtype=dtype)

    def work(name: str) -> tuple[float, int]:
        prompts, tokens, strategy = PROMPTS, max_new_tokens, name
        if name == "prompt":
            prompts, tokens, strategy = (LONG_PROMPT,), 1, "ar"
        started = time.perf_counter()
        found = [
            orthrus.generate(p, strategy=strategy, max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
            for p in prompts
        ]
        elapsed = (time.perf_counter() - started) * 1e3
        return elapsed, hash(tuple(tuple(each.token_ids) for each in found))

    for name in (*WORK, *WORK):
        work(name)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(work(line.strip())), flush=True)


def measure(arms: Sequence[Arm], model: str, dtype: str, max_new_tokens: int, repeats: int) -> dict[str, Any]:
    """The report: every arm does all work, beside any number of neighbours, in every repeat."""
    from orthrus.base.provenance import provenance

    times: dict[tuple[Arm, str, int], list[float]] = {}
    digests: dict[tuple[Arm, str], set[int]] = {}
    with ExitStack() as stack:
        # One after another: they compile where nothing is kept yet.
        ask = {arm: stack.enter_context(other_process(arm, model, dtype, max_new_tokens)) for arm in arms}
        for repeat in range(repeats):
            typer.echo(f"repeat {repeat + 1} of {repeats}", err=True)
            for num in NEIGHBOURS:
                with neighbours(num):
                    # Every other round goes the other way.
                    for arm in arms if repeat % 2 else reversed(arms):
                        for name in WORK:
                            elapsed, digest = ask[arm](name)
                            times.setdefault((arm, name, num), []).append(elapsed)
                            digests.setdefault((arm, name), set()).add(digest)
    changed = [f"{arm}, {name}" for (arm, name), found in digests.items() if len(found) > 1]
    if changed:
        raise SystemExit(f"the text changed with the load: {'; '.join(changed)}")
    return {
        "legend": LEGEND,
        "model": {"name": model, "dtype": dtype, "max_new_tokens": max_new_tokens, "repeats": repeats},
        "cores": os.cpu_count(),
        "results": rows(arms, times),
        "provenance": provenance(device="cpu", dtype=dtype, seed=None),
    }


def rows(arms: Sequence[Arm], times: dict[tuple[Arm, str, int], list[float]]) -> list[dict[str, Any]]:
    """A line for each arm, work and number of neighbours, as LEGEND defines them."""
    found = []
    for arm, name, num in times:
        own, quiet = times[arm, name, num], times[arm, name, 0]
        row = {"arm": str(arm), "work": name, "neighbours": num, "ms": spread(own)}
        row["busy_over_quiet"] = spread(ratios(own, quiet))
        if name == "auto":
            row["ar_over_auto"] = spread(ratios(times[arm, "ar", num], own))
        other = [each for each in arms if each.order == arm.order and each.source != OWN_SOURCE]
        if other and arm.source == OWN_SOURCE:
            row["over_reference"] = spread(ratios(own, times[other[0], name, num]))
        found.append(row)
    return sorted(found, key=lambda row: (row["arm"], WORK.index(row["work"]), row["neighbours"]))


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    from dataclasses import asdict

    from orthrus.bench.statistics import Spread

    return asdict(Spread.of(values))


def other_process(arm: Arm, model: str, dtype: str, max_new_tokens: int) -> AbstractContextManager[Ask]:
    """A process that has loaded the model; called with a kind of work it gives milliseconds and a digest."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    # One hash for the same tokens.
    environment |= {"PYTHONPATH": str(arm.source), "PYTHONHASHSEED": "0"}
    arguments = [__file__, "--model", model, "--dtype", dtype, "--serve", arm.order]
    return served([*arguments, "--max-new-tokens", str(max_new_tokens)], environment)


@contextmanager
def neighbours(num: int) -> Iterator[None]:
    """That many processes keep a core busy each."""
    with ExitStack() as stack:
        for _ in range(num):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", SPIN]))
            stack.callback(process.kill)
        time.sleep(SETTLE_S)
        yield


def to_markdown(report: dict[str, Any]) -> str:
    from orthrus.base.markdown import markdown_table

    def cell(row: dict[str, Any], name: str) -> str:
        return (
            f"{row[name]['median']:.3g} ({row[name]['low']:.3g}..{row[name]['high']:.3g})"
            if name in row
            else ""
        )

    names = ("ms", "busy_over_quiet", "ar_over_auto", "over_reference")
    body = [
        (row["arm"], row["work"], str(row["neighbours"]), *(cell(row, name) for name in names))
        for row in report["results"]
    ]
    return markdown_table(("process", "work", "neighbours", *names), body, "llrrrrr")


if __name__ == "__main__":
    typer.run(main)
