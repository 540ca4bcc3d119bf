"""A server under load: python benchmarks/serve_load.py [--help]

Starts `orthrus serve` and drives it as `orthrus bench serve` does: closed loops of 1 to 32 requests, then random
arrivals at shares of what plain decoding can serve at most. Requests are of four kinds in turn: short chats, long
prompts with short answers, short prompts with long answers, and questions behind one system prompt. Plain decoding
and `auto` get the same requests at the same times and take turns; every answer is compared with the same request
alone. Other servers (`--rival NAME=URL`, running already) get the same loads. Leave the machine alone meanwhile;
--quick rehearses.
"""

import json
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer
from own_server import served

from orthrus.base.bench_prompts import BenchPrompt, load_prompts
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.bench.load import LoadOptions, run_load
from orthrus.bench.load_client import Ask
from orthrus.bench.load_layout import summary
from orthrus.bench.load_report import LEGEND
from orthrus.bench.load_runs import Level

CONCURRENCY = (1, 4, 8, 16, 32)
SHARES = (0.25, 0.5, 0.75, 1.0, 1.25)
ARMS, OURS = ("ar", "auto"), "orthrus"
KINDS = {"short chat": 48, "long prompt": 16, "long answer": 192, "shared prompt": 48}
"""Kind of request: the most tokens of its answer."""
SEEDS_APART = 10_000
SYSTEM = (
    "You are the assistant of a small public library. Answer in plain words and in at most five sentences. "
    "Never invent titles, authors, prices or opening hours; say that you do not know, and whom to ask. "
    "The library opens at nine and closes at six, on Saturdays at one; on Sundays and public holidays it is closed. "
    "Books may be kept for four weeks and renewed twice, films for one week and not at all. "
    "A card costs nothing for people under eighteen and twelve a year for everybody else. "
    "Children's hour is on Wednesdays at four, the reading circle on the first Thursday of each month at seven. "
    "Whoever loses a book pays what a new one costs. Rooms can be booked a week ahead, for two hours a day. "
    "Where a question has nothing to do with the library, answer it all the same, as a good librarian would."
)


def mixed(number: int, share: float = 1.0) -> list[Ask]:
    """So many requests, of all kinds in turn. share: of the lengths of answers."""
    prompts = [prompt for prompt in load_prompts() if isinstance(prompt.prompt, str)]
    kinds = list(KINDS)
    return [_ask(kinds[i % len(kinds)], prompts, i // len(kinds), share) for i in range(number)]


def _ask(kind: str, prompts: list[BenchPrompt], index: int, share: float) -> Ask:
    texts = [str(prompt.prompt) for prompt in prompts]
    text = texts[index * 7 % len(texts)]
    messages = [{"role": "user", "content": text}]
    if kind == "shared prompt":
        messages.insert(0, {"role": "system", "content": SYSTEM})
    elif kind == "long prompt":
        # Each begins with another question, so that no two have pages in common.
        start = index * 5 % len(texts)
        many = "\n".join(f"- {each}" for each in (texts[start:] + texts[:start])[:20])
        messages[0]["content"] = f"Questions of today:\n{many}\nWhich of them is the hardest? Answer briefly."
    return Ask(messages, max(2, round(KINDS[kind] * share)), kind)


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file or 'default'.")] = "default",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, int8 or int4.")] = "bfloat16",
    serve: Annotated[
        list[str] | None, typer.Option(help="A further argument of `orthrus serve`; may be repeated.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="An `orthrus serve` that runs already, in place of our own.")
    ] = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL[#MODEL]",
            help="Another server, and its model's name, where it does not list it; may be repeated.",
        ),
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help=f"May be repeated. Left out: {CONCURRENCY}.")
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(
            help=f"Of plain decoding's most requests a second; may be repeated. Left out: {SHARES}."
        ),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="The fewest of a run; closed loops have 3 for each that is open.")
    ] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each arm at each load.")] = 2,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of requests and arrivals.")] = 0,
    ttft_limit: Annotated[float, typer.Option(help="Of a good answer, in ms.")] = 2000.0,
    tpot_limit: Annotated[float, typer.Option(help="Of a good answer, in ms.")] = 100.0,
    check: Annotated[bool, typer.Option(help="Compare every answer with the same request alone.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="A rehearsal: little of everything.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print a table and a line of JSON; the file is written after each level."""
    levels, shares = sorted(set(concurrency or CONCURRENCY)), sorted(set(share or SHARES))
    if quick:
        levels, shares, requests, repeats = levels[:2], shares[:2], min(requests, 4), 1
    rivals = [_rival(pair) for pair in rival or ()]
    if len({side.name for side in rivals}) < len(rivals):
        raise typer.BadParameter("two rivals have one name: their figures could not be told apart")
    path = output or Path(__file__).parent / "results" / "serve-load-cpu.json"
    report: dict[str, Any] = {
        "kind": "orthrus-serve-load",
        "legend": LEGEND
        | {
            "to_first_arm": "output tokens a second / those of ar at the same load and repeat; median",
            "capacity": "requests a second of ar, the most of all closed loops; `share` is of it",
        },
        "options": {
            "model": model,
            "dtype": dtype,
            "serve": serve or [],
            "requests": requests,
            "repeats": repeats,
            "temperature": temperature,
            "ttft_limit_ms": ttft_limit,
            "tpot_limit_ms": tpot_limit,
            "kinds": KINDS,
            "quick": quick,
        },
        "capacity": None,
        "servers": {},
        "rows": [],
    }
    seeds = count(seed, SEEDS_APART)

    def measure(address: str, level: Level, number: int, **more: Any) -> None:
        # Other prompts than at any other level: salts are made of the seed.
        its_seed = next(seeds)
        plain: list[float] = []
        for side in [_Side(OURS, address, arms=ARMS), *rivals]:
            found = run_load(
                LoadOptions(
                    url=side.url,
                    model=side.model,
                    asks=mixed(number, 0.1 if quick else 1.0),
                    levels=[level],
                    strategies=side.arms,
                    temperature=temperature,
                    seed=its_seed,
                    repeats=repeats,
                    warmup=len(KINDS),
                    check=check,
                    ttft_limit_ms=ttft_limit,
                    tpot_limit_ms=tpot_limit,
                ),
                _Told(side.name),
            )
            report["servers"][side.name] = found.server | {"check": found.options["check"]}
            for row in found.rows:
                speeds = [repeat["output_tokens_per_second"] for repeat in row["repeats"]]
                plain = plain or speeds
                row["to_first_arm"] = (
                    median(a / b for a, b in zip(speeds, plain, strict=True)) if all(plain) else None
                )
                row |= {"arm": row["arm"] if side.arms == ARMS else side.name} | more
                report["rows"].append(row)
        report["provenance"] = provenance(device="cpu", dtype=dtype, seed=seed)
        write_text_atomic(path, json.dumps(report, indent=2) + "\n")

    with ExitStack() as stack:
        options = ["--model", model, "--dtype", dtype, *(serve or [])]
        address = stack.enter_context(served(options)).url if url is None else url
        for level in levels:
            measure(address, Level(concurrency=level), max(requests, 3 * level if not quick else level))
        plain_rates = [row["requests_per_second"] for row in report["rows"] if row["arm"] == "ar"]
        report["capacity"] = max(plain_rates)
        if not report["capacity"]:
            raise RuntimeError("no request was answered, so there is no rate to aim at")
        for part in shares:
            rate = float(f"{part * report['capacity']:.4g}")
            measure(address, Level(rate=rate), requests if quick else 2 * requests, share=part)
    typer.echo(summary(report["rows"]))
    line = {
        f"{row['level']}, {row['arm']}": row["to_first_arm"] for row in report["rows"] if row["arm"] != "ar"
    }
    num_different = sum(row["num_different"] for row in report["rows"])
    typer.echo(json.dumps({"to_ar": line, "num_different": num_different}))


class _Side(NamedTuple):
    """A server under load, its model's name where it does not list it, and the arms that it has."""

    name: str
    url: str
    model: str | None = None
    arms: tuple[str | None, ...] = (None,)


def _rival(text: str) -> _Side:
    name, found, where = text.partition("=")
    url, _, model = where.partition("#")
    if not (name and found and url) or name in (*ARMS, OURS):
        raise typer.BadParameter(f"{text!r} is not NAME=URL or NAME=URL#MODEL, with a name of its own")
    return _Side(name, url, model or None)


class _Told:
    """Progress on stderr: one line for each run."""

    def __init__(self, name: str) -> None:
        self._name, self._stage = name, ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            typer.echo(f"{self._name}: {stage}", err=True)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
