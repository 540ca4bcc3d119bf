"""What each part of `auto`'s policy is worth: python benchmarks/policy_ablation.py FILE.jsonl ... [--help]

Every arm takes one part away, and answers the same prompts. An arm is judged by the milliseconds that the machine's
cost table names for its passes, not by the clock: no arm suffers from the moment at which it ran, and one run
is enough. With --machine the table is one that is made up: decisions and their prices are then those of such a
machine, whatever this one takes. Copies are off, so that the view's drafts alone are seen.
"""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from orthrus.api import Orthrus, decode_config
from orthrus.base.bench_prompts import load_prompts
from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import check_report, write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.bench.runner import prompts_digest
from orthrus.decoding.average import MEMORY, TRUSTED, Ratio
from orthrus.decoding.cost_table import CostTable, joint_guesses
from orthrus.decoding.policy import Policy
from orthrus.decoding.prices import Prices
from orthrus.engine.engine import Engine, EngineConfig
from orthrus.model.passes import Pass
from orthrus.model.pool import SlotPool
from orthrus.model.runner import Runner

LEGEND = {
    "tokens_per_second": "new tokens / seconds that the cost table names for passes and drafts, without prompts",
    "to_policy": "tokens_per_second / that of the policy as it is, same prompts, dtype and concurrency",
    "to_plain": "tokens_per_second / that of plain decoding, likewise",
    "tokens_per_pass": "new tokens / passes that decoded",
}
_ROWS = (1, 8, 16, 32, 64, 128)


def _made_up(*body_ms: float) -> CostTable:
    """Block rows cost what AR rows do; the head a tenth of the body."""
    added = tuple(ms - body_ms[0] for ms in body_ms)
    head_ms = tuple(ms / 10 for ms in body_ms)
    block_rows = tuple(n - 1 for n in _ROWS)
    return CostTable(
        _ROWS, body_ms, head_ms, block_rows[1:], added[1:], block_rows, body_ms, (1, 2), (0.2, 0.2)
    )


MACHINES = {
    "flat": _made_up(10.0, 10.1, 10.2, 10.4, 10.8, 12.0),
    "middle": _made_up(10.0, 10.9, 12.5, 17.0, 28.0, 52.0),
}
"""flat: rows cost next to nothing, as on a GPU with memory to spare. middle: as with AVX-512 in float32."""


class Priced(Engine):
    """An engine that adds up what the table names for its passes. Its prices do not follow the machine."""

    def __init__(self, runner: Runner, table: CostTable, policy: type[Policy], concurrency: int) -> None:
        config = EngineConfig(reuse=False, max_running=concurrency, policy=policy)
        super().__init__(runner, config, observers=[self._add])
        self.table, self.fixed = table, Prices(table)
        self.ms, self.num_passes = 0.0, 0

    def prices(self, *, greedy: bool) -> Prices:
        """The same for greedy and for sampled decoding."""
        return self.fixed

    def _add(self, p: Pass, pool: SlotPool, hidden_RC: Tensor) -> None:
        dual, table = self.runner.dual, self.table
        parts = [span.part for span in p.spans]
        # Of a prompt's chunk one row at most is judged. What decodes beside one costs the difference.
        num_prompt_rows = sum(part.num_ar for part in parts if len(part.judged) < part.num_ar)
        blocks = [
            ((part.num_rows - part.num_ar) // part.block_size, dual.config.num_guesses(part.block_size))
            for part in parts
            if part.block_size
        ]
        num_guesses = sum(n * guesses for n, guesses in blocks)
        num_projected = joint_guesses(num_guesses, own_head=dual.draft_head is not None)
        if p.num_ar_rows == num_prompt_rows:
            return
        ms = table(p.num_ar_rows, p.num_rows - p.num_ar_rows, num_projected)
        ms += sum(n * table.draft_ms(guesses) for n, guesses in blocks)
        self.ms += ms - (table(num_prompt_rows) if num_prompt_rows else 0.0)
        self.num_passes += 1


class Margin(Policy):
    """Drafting must promise a twentieth more than plain decoding."""

    @property
    def plain_rate(self) -> float:
        return 1.05 * super().plain_rate


class SamePatience(Policy):
    MOST_PATIENCE = Policy.PATIENCE


class TriesWhateverItCosts(Policy):
    def _hoped_rate(self) -> float:
        return float("inf")


class OneLength(Policy):
    LENGTHS = ()


class ThreeLengths(Policy):
    LENGTHS = (2, 6)


class NoStaleDrafts(Policy):
    def keeps_stale(self) -> bool:
        """Never."""
        return False


class DistrustsStale(Policy):
    """At first stale drafts are expected to promise a little more than half of what fresh ones do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stale.value *= 0.6


class NoShare(Policy):
    SHARED = 1.0


class Certain(Ratio):
    """Promises are believed as they are."""

    def add(self, accepted: float, promised: float) -> None:
        """Nothing is learnt."""


class BelievesFresh(Policy):
    def __post_init__(self) -> None:
        self._fresh_trust = Certain()
        super().__post_init__()


class CorrectsSlowly(Policy):
    """Promises are corrected over four times as many drafts."""

    def __post_init__(self) -> None:
        memory, start = 1 - (1 - MEMORY) / 4, 4 * TRUSTED
        self._fresh_trust, self._stale_trust = Ratio(memory, start), Ratio(memory, start)
        super().__post_init__()


class BelievesStale(Policy):
    def __post_init__(self) -> None:
        self._stale_trust = Certain()
        super().__post_init__()


class NoBlocksBeside(Policy):
    def num_blocks(self, num_nodes: int, end_probs: Sequence[float]) -> int:
        """None: every draft has a pass of its own."""
        return 0


ARMS: dict[str, type[Policy]] = {
    "policy": Policy,
    "a margin of 1.05": Margin,
    "patience never doubles": SamePatience,
    "tries although none can pay": TriesWhateverItCosts,
    "whole blocks only": OneLength,
    "three lengths": ThreeLengths,
    "stale drafts thrown away": NoStaleDrafts,
    "stale drafts distrusted at first": DistrustsStale,
    "rows of company at the table's price": NoShare,
    "fresh promises believed": BelievesFresh,
    "stale promises believed": BelievesStale,
    "no blocks beside drafts": NoBlocksBeside,
    "promises corrected slowly": CorrectsSlowly,
}


def main(
    files: Annotated[list[Path], typer.Argument(help="JSONL files of prompts.")],
    output: Annotated[Path, typer.Option(help="JSON file to write.")],
    dtype: Annotated[
        list[str] | None, typer.Option(help="May be repeated. Left out: bfloat16, int8.")
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="May be repeated. Left out: 1, 4.")
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option(help=f"May be repeated: measured, {', '.join(MACHINES)}. Left out: measured."),
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="May be repeated. Left out: all.")] = None,
    per_file: Annotated[int, typer.Option(min=1, help="The first prompts of each file.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 96,
) -> None:
    """Run the arms, print a table, and write the file after each level."""
    arms = {name: ARMS[name] for name in ["policy", *(arm or list(ARMS)[1:])]}
    check_report(output)
    prompts = [prompt for file in files for prompt in load_prompts(file)[:per_file]]
    report: dict[str, Any] = {
        "kind": "orthrus-policy-ablation",
        "legend": LEGEND,
        "options": {"files": [f.name for f in files], "per_file": per_file, "max_new_tokens": max_new_tokens},
        "prompts": prompts_digest(prompts),
        "results": [],
    }
    for name in dtype or ["bfloat16", "int8"]:
        orthrus = Orthrus.load("default", dtype=name)
        ids = [orthrus.base.encode_prompt(prompt.prompt) for prompt in prompts]
        report["provenance"] = provenance(device="cpu", dtype=name, seed=None)
        for kind, level in product(machine or ["measured"], concurrency or [1, 4]):
            table = MACHINES[kind] if kind in MACHINES else orthrus.time_passes().greedy
            runner = orthrus.engine.runner
            for result in measured(runner, table, arms, ids, level, max_new_tokens):
                report["results"].append({"dtype": name, "machine": kind, "concurrency": level} | result)
            write_text_atomic(output, json.dumps(report, indent=1) + "\n")
    keys = (
        "dtype",
        "machine",
        "concurrency",
        "arm",
        "tokens_per_second",
        "to_policy",
        "to_plain",
        "tokens_per_pass",
    )
    typer.echo(markdown_table(list(keys), [[str(r[key]) for key in keys] for r in report["results"]]))


def measured(
    runner: Runner,
    table: CostTable,
    arms: dict[str, type[Policy]],
    prompts: list[list[int]],
    concurrency: int,
    num_new: int,
) -> list[dict[str, Any]]:
    """All arms at one concurrency; every text must be plain decoding's."""

    def answered(policy: type[Policy], strategy: str) -> tuple[Priced, list[list[int]]]:
        engine = Priced(runner, table, policy, concurrency)
        config = decode_config(strategy=strategy, max_new_tokens=num_new, ignore_eos=True, copies=False)  # type: ignore[arg-type]
        requests = [engine.submit(ids, config, eos_token_ids=frozenset()) for ids in prompts]
        while not all(request.closed for request in requests):
            engine.step()
        return engine, [request.token_ids for request in requests]

    plain, expected = answered(Policy, "ar")
    found: list[dict[str, Any]] = []
    base = 0.0
    for arm, policy in arms.items():
        engine, texts = answered(policy, "auto")
        assert texts == expected, f"{arm} changed a text"
        rate, plain_rate = (len(prompts) * num_new / e.ms * 1e3 for e in (engine, plain))
        base = base or rate
        found.append(
            {
                "arm": arm,
                "tokens_per_second": round(rate, 2),
                "to_policy": round(rate / base, 4),
                "to_plain": round(rate / plain_rate, 4),
                "tokens_per_pass": round(len(prompts) * num_new / engine.num_passes, 3),
            }
        )
        typer.echo(f"{concurrency} at a time, {arm}: {found[-1]['to_policy']}", err=True)
    return found


if __name__ == "__main__":
    typer.run(main)
