"""What a cycle costs as the context grows: python benchmarks/long_context.py [--help]

All contexts and strategies take turns in one run, repeat by repeat, so that what slows the machine down hits
all of them. Each time a request of the same prompt takes up the pages that are kept of it, and the cycle that
is timed starts from the same state; it has the same rows at every context.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any
from unittest.mock import patch

import typer

from orthrus.api import Orthrus
from orthrus.base.devices import synchronize
from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.bench.cycles import ready_request, step_cycle
from orthrus.bench.statistics import Spread
from orthrus.cli.common import check_strategies
from orthrus.config import Strategy
from orthrus.engine import round as round_module
from orthrus.engine.beside import EngineBeside
from orthrus.engine.engine import Engine
from orthrus.model.pool import slot_bytes

CONTEXTS = (256, 1024, 2048, 4096, 8000)
STRATEGIES: tuple[Strategy, ...] = ("ar", "chain", "fused_tree")
PARTS = ("layers", "head", "upkeep", "rest")

LEGEND = {
    "cycle_ms": "time of one cycle after `context` tokens; median (min..max) over repeats",
    "ratio": "cycle_ms / that of the shortest context in the same repeat; median (min..max) over repeats",
    "layers_ms": "of a second run of that cycle: decoder layers of its passes, attention included; median",
    "head_ms": "its projections to the vocabulary; median",
    "upkeep_ms": "joining its parts into passes: checks, the plan for attention, the pool's ledger; median",
    "rest_ms": "all else: building parts, choosing tokens, trees, moving accepted rows; median",
    "num_passes, num_rows": "of one cycle; the same at every context",
    "prefill_ms": "time to first token of the request that filled the pages, once for each context",
    "kv_bytes": "keys and values of the pages that the request has at the end of the cycle",
    "history_bytes": "keys and values of `context` tokens",
}


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file or 'default'.")] = "default",
    view: Annotated[str, typer.Option(help="View folder, 'default' or 'untrained'.")] = "default",
    context: Annotated[
        list[int] | None, typer.Option(min=1, help=f"May be repeated. Left out: {CONTEXTS}.")
    ] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"May be repeated. Left out: {STRATEGIES}.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of everything.")] = 15,
    warmup: Annotated[int, typer.Option(min=0, help="Repeats before, not counted.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the ids that fill the context.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print a table and a line of JSON, keep the result."""
    strategies = check_strategies(strategy) if strategy else list(STRATEGIES)
    if "auto" in strategies:
        raise typer.BadParameter("auto chooses another cycle every time; name fixed strategies")
    orthrus = Orthrus.load(model, view, dtype, device)
    cases = [
        case
        for length in sorted(set(context or CONTEXTS))
        for case in filled_cases(orthrus, length, strategies, seed)
    ]
    for repeat in range(warmup + repeats):
        typer.echo(f"repeat {repeat + 1} of {warmup + repeats}", err=True)
        # Every other round goes the other way.
        for case in cases if repeat % 2 else reversed(cases):
            case.measure()
    report = build_report(orthrus, cases, warmup, {"repeats": repeats, "warmup": warmup}, seed)
    kind = report["model"]["device"].split(":")[0]
    path = output or Path(__file__).parent / "results" / f"long-context-{kind}.json"
    write_text_atomic(path, json.dumps(report, indent=2) + "\n")
    typer.echo(to_markdown(report))
    line = {
        f"{row['strategy']}, {row['context']}": round(row["ratio"]["median"], 3) for row in report["results"]
    }
    typer.echo(json.dumps({"ratio": line}))


@dataclass(slots=True)
class Case:
    """A cycle of one strategy after one context, to be run as often as wanted. Times in ms."""

    strategy: Strategy
    context: int
    engine: Engine
    prompt_ids: list[int]
    prefill_ms: float
    kv_bytes: int = 0
    whole: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    shape: tuple[int, int] = (0, 0)

    def measure(self) -> None:
        """One cycle timed as a whole, then one in parts: clocks inside would stall an accelerator."""
        self.whole.append(self._cycle({}))
        spent = {"hidden": 0.0, "head": 0.0, "join": 0.0}
        total = self._cycle(spent)
        rest = total - sum(spent.values())
        self.parts.append(
            {"layers": spent["hidden"], "head": spent["head"], "upkeep": spent["join"], "rest": rest}
        )

    def _cycle(self, spent: dict[str, float]) -> float:
        request = ready_request(self.engine, self.prompt_ids, self.strategy)
        dual = self.engine.runner.dual
        with clocks(self.engine, spent):
            synchronize(dual.device)
            started = perf_counter()
            step_cycle(self.engine, request)
            synchronize(dual.device)
            elapsed = (perf_counter() - started) * 1e3
        cycle = request.cycles[-1]
        self.shape = cycle.num_passes, cycle.num_rows
        self.kv_bytes = request.slots.num_slots * slot_bytes(dual.base.config, self.engine.runner.kv_dtype)
        self.engine.drop(request)
        return elapsed


def filled_cases(orthrus: Orthrus, context: int, strategies: list[Strategy], seed: int) -> Iterator[Case]:
    """Prefill `context` random ids once; every strategy decodes behind them, from the kept pages."""
    dual, limit = orthrus.dual, orthrus.base.context_length
    # A cycle, the draft before it and the draft that it leaves behind.
    if context + 3 * dual.config.block_size > limit:
        raise typer.BadParameter(
            f"a context of {context} leaves no room for a cycle below the model's {limit}"
        )
    typer.echo(f"prefill of {context} tokens", err=True)
    prompt_ids = random.Random(seed).choices(range(dual.vocab_size), k=context)
    engine = EngineBeside(orthrus.engine, reuse=True, max_slots=context + 1024)
    started = perf_counter()
    request = ready_request(engine, prompt_ids, "ar")
    prefill_ms = (perf_counter() - started) * 1e3
    engine.drop(request)
    for strategy in strategies:
        yield Case(strategy, context, engine, prompt_ids, prefill_ms)


@contextmanager
def clocks(engine: Engine, spent: dict[str, float]) -> Iterator[None]:
    """Adds the milliseconds that calls of these names take: of the runner, and `join` of the round."""
    device = engine.runner.dual.device

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            started = perf_counter()
            result = call(*args, **kwargs)
            synchronize(device)
            spent[name] += (perf_counter() - started) * 1e3
            return result

        return run

    with ExitStack() as stack:
        for name in spent:
            owner = round_module if name == "join" else engine.runner
            stack.enter_context(patch.object(owner, name, timed(name, getattr(owner, name))))
        yield


def build_report(
    orthrus: Orthrus, cases: list[Case], warmup: int, options: dict[str, Any], seed: int
) -> dict[str, Any]:
    """All results, and where they come from."""
    about = orthrus.describe()
    bytes_of_slot = slot_bytes(orthrus.dual.base.config, orthrus.engine.runner.kv_dtype)
    return {
        "kind": "orthrus-long-context",
        "legend": LEGEND,
        "results": [_row(case, cases, warmup, bytes_of_slot) for case in cases],
        "model": about,
        "options": options,
        "provenance": provenance(device=about["device"], dtype=about["dtype"], seed=seed),
    }


def _row(case: Case, cases: list[Case], warmup: int, bytes_of_slot: int) -> dict[str, Any]:
    base = next(other for other in cases if other.strategy == case.strategy)
    kept = case.whole[warmup:]
    parts = {
        f"{name}_ms": round(Spread.of(part[name] for part in case.parts[warmup:]).median, 3) for name in PARTS
    }
    num_passes, num_rows = case.shape
    return {
        "strategy": case.strategy,
        "context": case.context,
        "cycle_ms": _spread(kept),
        "ratio": _spread([a / b for a, b in zip(kept, base.whole[warmup:], strict=True)]),
        **parts,
        "num_passes": num_passes,
        "num_rows": num_rows,
        "prefill_ms": round(case.prefill_ms, 1),
        "kv_bytes": case.kv_bytes,
        "history_bytes": bytes_of_slot * case.context,
    }


def _spread(values: list[float]) -> dict[str, float]:
    spread = Spread.of(values)
    return {"median": round(spread.median, 4), "low": round(spread.low, 4), "high": round(spread.high, 4)}


def to_markdown(report: dict[str, Any]) -> str:
    """The table, strategy by strategy, and what its columns mean."""
    lines = []
    for row in sorted(report["results"], key=lambda row: row["strategy"]):
        lines.append(
            [row["strategy"], str(row["context"]), _shown(row["cycle_ms"], 1), _shown(row["ratio"], 2)]
            + [f"{row[f'{name}_ms']:.2f}" for name in PARTS]
            + [f"{row[name] / 2**20:.1f}" for name in ("kv_bytes", "history_bytes")]
        )
    head = ["strategy", "context", "cycle, ms", "ratio", *PARTS, "KV, MiB", "history, MiB"]
    legend = "\n".join(f"- `{name}`: {text}" for name, text in report["legend"].items())
    return f"{markdown_table(head, lines, 'l' + 'r' * (len(head) - 1))}\n\n{legend}\n"


def _shown(spread: dict[str, float], digits: int) -> str:
    return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f}..{spread['high']:.{digits}f})"


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
