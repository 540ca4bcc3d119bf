"""What passes and plain decoding cost by dtype and runner: python benchmarks/runners.py [--help]

All settings take turns in one run, repeat by repeat. Start-up is timed in processes of their own, on a warm
cache.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer

from orthrus.api import Orthrus, decode_config
from orthrus.base.devices import synchronize
from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.bench.cycles import without_reuse
from orthrus.bench.statistics import Spread
from orthrus.engine.stock import stock_generate
from orthrus.model.passes import Pass, causal, join, tree
from orthrus.model.pool import SlotPool, Slots, pages_for

SETTINGS = (
    "float32/eager",
    "float32/compiled",
    "float32+int8/compiled",
    "bfloat16/compiled",
    "int8/compiled",
    "int4/compiled",
)
ROWS = (1, 2, 4, 8, 16, 32)
BLOCKS, BESIDE = (1, 3), 8
PROMPT = "Natalia sold clips to 48 friends in April, and half as many in May. How many in all?"

LEGEND = {
    "pass_ms": "a pass of n AR rows, all projected, after `history` tokens; median (min..max) over repeats",
    "to_one_row": "its median / that of one row, same setting",
    "block_ms": f"the same with {BESIDE} AR rows and m diffusion blocks, all rows projected",
    "plain_tokens_per_s": "strategy ar: decoded tokens / decode time, prefill apart; median (min..max)",
    "stock_tokens_per_s": "the stock model's own `generate`, same setting's weights, eager; same formula",
    "plain_to_stock_float32": "plain_tokens_per_s / stock_tokens_per_s of float32 in that repeat; median",
    "first_token_s": "`orthrus generate` as it comes, process start to first character; each start but one",
}


@dataclass(slots=True)
class Arm:
    """One setting with everything that is timed on it."""

    name: str
    orthrus: Orthrus
    passes: dict[str, Pass]
    pool: SlotPool
    pass_ms: dict[str, list[float]] = field(default_factory=dict)
    plain: list[float] = field(default_factory=list)
    stock: list[float] = field(default_factory=list)

    @torch.inference_mode()
    def time_passes(self) -> None:
        runner, device = self.orthrus.engine.runner, self.orthrus.dual.device
        # Not timed: another setting's weights are in the caches, and passes follow passes of their own.
        runner.hidden(next(iter(self.passes.values())), self.pool)
        for name, p in self.passes.items():
            synchronize(device)
            started = perf_counter()
            runner.head(runner.hidden(p, self.pool))
            synchronize(device)
            self.pass_ms.setdefault(name, []).append((perf_counter() - started) * 1e3)

    def time_decoding(self, num_tokens: int) -> None:
        prompt_ids = self.orthrus.base.encode_prompt(PROMPT)
        config = decode_config(strategy="ar", max_new_tokens=num_tokens, ignore_eos=True)
        stats = self.orthrus.stream_ids(prompt_ids, config).drain().stats
        self.plain.append((stats.num_tokens - 1) / stats.decode_ms * 1e3)
        model = self.orthrus.stock()
        run = stock_generate(model, prompt_ids, max_new_tokens=num_tokens, eos_token_ids=frozenset())
        self.stock.append((len(run.token_ids) - 1) / run.decode_ms * 1e3)


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file or 'default'.")] = "default",
    view: Annotated[str, typer.Option(help="View folder, 'default' or 'untrained'.")] = "default",
    setting: Annotated[
        list[str] | None,
        typer.Option(metavar="DTYPE[+DRAFT]/RUNNER", help=f"May be repeated. Left out: {SETTINGS}."),
    ] = None,
    history: Annotated[int, typer.Option(min=1, help="Tokens before a timed pass.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of everything.")] = 15,
    num_tokens: Annotated[int, typer.Option(min=2, help="Of a timed decoding.")] = 64,
    starts: Annotated[int, typer.Option(min=0, help="Timed process starts, with all defaults.")] = 3,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print a table and a line of JSON, keep the result."""
    arms = [load_arm(name, model, view, device, history) for name in setting or SETTINGS]
    for repeat in range(repeats + 1):
        typer.echo(f"repeat {repeat} of {repeats}", err=True)
        for arm in arms if repeat % 2 else reversed(arms):
            arm.time_passes()
            if repeat == 0 or repeat % 3 == 1:
                arm.time_decoding(num_tokens)
        if repeat == 0:
            # The first repeat warms up.
            for arm in arms:
                arm.pass_ms, arm.plain, arm.stock = {}, [], []
    options = {"history": history, "repeats": repeats, "num_tokens": num_tokens, "starts": starts}
    about = arms[0].orthrus.describe()
    report = {
        "kind": "runners",
        "provenance": provenance(device=about["device"], dtype=", ".join(a.name for a in arms), seed=None),
        "model": about,
        "options": options,
        "legend": LEGEND,
        "results": results(arms),
        "first_token_s": [first_token_s(model, view) for _ in range(starts + bool(starts))][1:],
    }
    path = output or Path(__file__).parent / "results" / f"runners-{about['device'].split(':')[0]}.json"
    write_text_atomic(path, json.dumps(report, indent=2) + "\n")
    typer.echo(to_markdown(report))
    typer.echo(
        json.dumps(
            {row["setting"]: round(row["plain_tokens_per_s"]["median"], 1) for row in report["results"]}
        )
    )


def load_arm(name: str, model: str, view: str, device: str | None, history: int) -> Arm:
    """One setting, loaded, with filled slots and the passes that are to be timed."""
    kind, _, runner = name.partition("/")
    dtype, _, draft_dtype = kind.partition("+")
    typer.echo(f"loading {name}", err=True)
    loaded = Orthrus.load(model, view, dtype, device, runner=runner, draft_dtype=draft_dtype or None)
    orthrus = without_reuse(loaded)
    dual, size = orthrus.dual, orthrus.dual.config.block_size
    ids = [i % dual.vocab_size for i in range(max(history, *ROWS))]
    most = history + max(*ROWS, BESIDE + max(BLOCKS) * size)
    pool = orthrus.engine.runner.new_pool(pages_for(most))
    slots = Slots(pool)
    slots.reserve(most)
    with torch.inference_mode():
        orthrus.engine.runner.hidden(join([(causal(ids[:history]), slots)], dual.device), pool)
    slots.commit(history)
    parts = {f"{n}": causal(ids[:n]) for n in ROWS}
    for m in BLOCKS:
        parts[f"{BESIDE}+{m} blocks"] = tree(
            ids[:BESIDE], range(BESIDE - 1), range(m), size, dual.mask_token_id
        )
    passes = {name: join([(part, slots)], dual.device) for name, part in parts.items()}
    return Arm(name, orthrus, passes, pool)


def results(arms: list[Arm]) -> list[dict[str, Any]]:
    """A row for each setting."""
    stock32 = next((arm.stock for arm in arms if arm.name.startswith("float32")), arms[0].stock)
    rows = []
    for arm in arms:
        one = median(arm.pass_ms["1"])
        rows.append(
            {
                "setting": arm.name,
                "pass_ms": {name: asdict(Spread.of(values)) for name, values in arm.pass_ms.items()},
                "to_one_row": {name: median(values) / one for name, values in arm.pass_ms.items()},
                "plain_tokens_per_s": asdict(Spread.of(arm.plain)),
                "stock_tokens_per_s": asdict(Spread.of(arm.stock)),
                "plain_to_stock_float32": median(
                    ours / stock for ours, stock in zip(arm.plain, stock32, strict=True)
                ),
            }
        )
    return rows


def first_token_s(model: str, view: str) -> float:
    """Start `orthrus generate` as a user would, and wait for the first character of its answer."""
    command = [sys.executable, "-m", "orthrus.cli.app", "generate", "-q", "--view", view, model, PROMPT]
    started = perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "ORTHRUS_RUNNER"}
    with subprocess.Popen([*command, "-n", "8"], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        elapsed = perf_counter() - started
        process.stdout.read()
    if process.returncode:
        raise typer.Exit(process.returncode)
    return elapsed


def to_markdown(report: dict[str, Any]) -> str:
    """The table of a report."""
    names = list(report["results"][0]["pass_ms"])
    head = ["setting", *(f"{name} rows" if name.isdigit() else name for name in names), "plain", "stock", "x"]
    table = []
    for row in report["results"]:
        cells = [f"{row['pass_ms'][n]['median']:.1f} ({row['to_one_row'][n]:.2f})" for n in names]
        speeds = [f"{row[key]['median']:.1f}" for key in ("plain_tokens_per_s", "stock_tokens_per_s")]
        table.append([row["setting"], *cells, *speeds, f"{row['plain_to_stock_float32']:.2f}"])
    starts = report["first_token_s"]
    note = f"\n\nfirst token after {median(starts):.1f} s" if starts else ""
    return markdown_table(head, table) + note


if __name__ == "__main__":
    typer.run(main)
