"""The raw record of one answer: what every number of a report is computed from, and nothing else."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

from orthrus.bench.arms import STOCK
from orthrus.bench.work import Work
from orthrus.engine.stock import StockRun
from orthrus.types import Cycle, GenerationResult


class _AtTemperature(Protocol):
    @property
    def temperature(self) -> float: ...


_Measured = TypeVar("_Measured", bound=_AtTemperature)


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt decoded once by one arm. Times in ms.

    The prefill gives the first token and is no cycle. `committed`: for each cycle after it, the tokens that it added.
    The next three lists have an entry for each cycle that drafted. `drafted`: the drafts that the AR view judged; of a
    tree every node. `judged`: the length of the judged path; of a tree along its first branch. `accepted`: the accepted
    drafts. `work`: rows, passes and reads after the first token. `peak_bytes` and `joules` are None if the machine does
    not report them. `equal_to_plain` is None for sampled stock text, which another random generator draws.
    """

    arm: str
    prompt_index: int
    domain: str
    repeat: int
    temperature: float
    num_prompt_tokens: int
    num_tokens: int
    num_passes: int
    num_prefill_passes: int
    num_rows: int
    num_cycles: int
    num_drafted: int
    num_accepted: int
    accepted_histogram: tuple[int, ...]
    ttft_ms: float
    decode_ms: float
    equal_to_plain: bool | None = None
    committed: tuple[int, ...] = ()
    drafted: tuple[int, ...] = ()
    judged: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    work: Work | None = None
    peak_bytes: int | None = None
    joules: float | None = None
    output: str = ""

    @property
    def total_ms(self) -> float:
        return self.ttft_ms + self.decode_ms

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Run":
        """The run behind `asdict`; TypeError or KeyError for anything else."""
        names = {field.name for field in fields(cls)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in names
        }
        if values.get("work") is not None:
            values["work"] = Work(**values["work"])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class About:
    """Which answer this was, and what was measured around it."""

    prompt_index: int
    domain: str
    repeat: int
    temperature: float
    peak_bytes: int | None = None
    joules: float | None = None
    output: str = ""


def run_of_result(arm: str, about: About, result: GenerationResult, work: Work | None = None) -> Run:
    """A run of ours."""
    stats = result.stats
    cycles = [cycle for cycle in result.cycles if cycle.kind != "prefill"]
    drafting = [cycle for cycle in cycles if cycle.num_drafted]
    return Run(
        arm=arm,
        num_prompt_tokens=stats.num_prompt_tokens,
        num_tokens=stats.num_tokens,
        num_passes=stats.num_passes,
        num_prefill_passes=stats.num_prefill_passes,
        num_rows=stats.num_rows,
        num_cycles=stats.num_cycles,
        num_drafted=stats.num_drafted,
        num_accepted=stats.num_accepted,
        accepted_histogram=stats.accepted_histogram,
        ttft_ms=stats.ttft_ms,
        decode_ms=stats.decode_ms,
        committed=tuple(len(cycle.token_ids) for cycle in cycles),
        drafted=tuple(cycle.num_drafted for cycle in drafting),
        judged=tuple(map(_judged, drafting)),
        accepted=tuple(cycle.num_accepted for cycle in drafting),
        work=work,
        **_about(about),
    )


def run_of_stock(about: About, num_prompt_tokens: int, run: StockRun, work: Work | None = None) -> Run:
    """A run of the stock model: its prefill gives the first token, every further pass of one row one more."""
    num_tokens = len(run.token_ids)
    return Run(
        arm=STOCK,
        num_prompt_tokens=num_prompt_tokens,
        num_tokens=num_tokens,
        num_passes=num_tokens,
        num_prefill_passes=1,
        num_rows=num_tokens - 1,
        num_cycles=num_tokens - 1,
        num_drafted=0,
        num_accepted=0,
        accepted_histogram=(),
        ttft_ms=run.ttft_ms,
        decode_ms=run.decode_ms,
        committed=(1,) * (num_tokens - 1),
        work=work,
        **_about(about),
    )


def output_digest(token_ids: Sequence[int]) -> str:
    """A short name for exactly these tokens: 16 hex digits."""
    return hashlib.blake2b(repr(tuple(token_ids)).encode(), digest_size=8).hexdigest()


def by_temperature(measured: Sequence[_Measured]) -> list[tuple[float, list[_Measured]]]:
    """Runs, or rows of them, apart by temperature, in the order in which temperatures first come."""
    return [
        (temperature, [each for each in measured if each.temperature == temperature])
        for temperature in dict.fromkeys(each.temperature for each in measured)
    ]


def _judged(cycle: Cycle) -> int:
    # Drafts after an end or a limit are in neither count, because it is unknown whether they would be accepted.
    return min(cycle.num_accepted + len(cycle.rejected_ids), cycle.num_drafted)


def _about(about: About) -> dict[str, Any]:
    return {name: getattr(about, name) for name in about.__slots__}
