"""The report of a load test: from single answers to the figures of each level and arm."""

import csv
import hashlib
import io
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from statistics import median
from typing import Any

import numpy as np

from orthrus.base.provenance import provenance
from orthrus.bench.load_client import Answer
from orthrus.bench.load_layout import block, summary
from orthrus.bench.load_runs import Run

KIND = "orthrus-load"
FORMAT_VERSION = 1
OF_THE_SERVER = ("device", "dtype", "accelerator", "threads")
"""What `provenance` says of this process, which computes nothing here."""

_SPREAD = "mean, median, 95th and 99th percentile over "
LEGEND = {
    "num_ok": "requests with a whole answer, of all repeats",
    "num_refused": "requests that got a 429",
    "num_failed": "requests that failed otherwise",
    "num_repeated": "requests sent once more, since the server had closed the kept connection that they went over",
    "duration_s": "from the first request to the last answer; sum over repeats",
    "input_tokens": "sum of usage.prompt_tokens, of answers that are whole, as all that follows",
    "cached_tokens": "those of them that the server found in its cache, if it reports that",
    "output_tokens": "sum of usage.completion_tokens",
    "requests_per_second": "num_ok / duration_s",
    "goodput": "answers within the limits on ttft_ms and tpot_ms / duration_s; null without limits",
    "output_tokens_per_second": "output_tokens / duration_s",
    "total_tokens_per_second": "(input_tokens + output_tokens) / duration_s",
    "to_first_arm": "output tokens a second / those of the first arm at the same level and repeat; median",
    "concurrency_mean": "sum of e2e of all requests / duration_s",
    "concurrency_peak": "the most requests that were open at one moment",
    "ttft_ms": f"{_SPREAD}requests of the time from sending to the first chunk with a token",
    "tpot_ms": f"{_SPREAD}requests of (last - first chunk with a token) / (tokens - 1)",
    "itl_ms": f"{_SPREAD}all gaps between chunks with tokens; a chunk may bring several",
    "e2e_ms": f"{_SPREAD}requests of the time from sending to the last event",
    "late_ms": "the most that this program sent a request after its time (random arrivals only)",
    "acceptance_rate": "accepted drafts / verified drafts (metrics.speculative_decoding)",
    "acceptance_length": "1 + accepted drafts / cycles that verified drafts",
    "tokens_per_forward": "output tokens / passes that their requests took part in (metrics.orthrus)",
    "kinds": "the figures that need no duration, by kind of request (the prompts' domain)",
    "num_checked": "answers that were compared with the same request alone",
    "num_different": "those of them with other token ids",
}


@dataclass(frozen=True)
class LoadReport:
    """rows: the figures of `LEGEND` by level and arm. requests: what was measured of each."""

    rows: tuple[dict[str, Any], ...]
    requests: tuple[dict[str, Any], ...]
    server: dict[str, Any]
    options: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def num_ok(self) -> int:
        return sum(row["num_ok"] for row in self.rows)

    @property
    def num_different(self) -> int:
        return sum(row["num_different"] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and complete."""
        return {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "server": self.server,
            "options": self.options,
            "provenance": self.provenance,
            "legend": LEGEND,
            "rows": list(self.rows),
            "requests": list(self.requests),
        }

    def to_table(self) -> str:
        """A block for each level and arm; behind several of them one table."""
        blocks = [block(row) for row in self.rows]
        if len(self.rows) > 1:
            blocks.append(summary(self.rows))
        return "\n\n".join([*blocks, self._checked]) + "\n"

    def to_markdown(self) -> str:
        """One table of all levels and arms."""
        head = f"**{self.server['model']}** at {self.server['url']}\n\n`{self.provenance['command']}`"
        return f"{head}\n\n{summary(self.rows)}\n\n{self._checked}\n"

    def to_csv(self) -> str:
        """A line for each level and arm."""
        out = io.StringIO()
        lines = [dict(_flat(row)) for row in self.rows]
        writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return out.getvalue()

    @property
    def _checked(self) -> str:
        num_checked = sum(row["num_checked"] for row in self.rows)
        found = f"; {self.num_different} of {num_checked} answers differ" if num_checked else ""
        return f"Check: {self.options['check']}{found}."


def load_report(
    runs: Sequence[Run], server: dict[str, Any], options: dict[str, Any], *, secret: str | None
) -> LoadReport:
    """The report of all runs. secret: a text to remove from the recorded command line."""
    where = provenance(device="cpu", dtype="", seed=options["seed"])
    if secret:
        for spelled in (shlex.quote(secret), secret):
            where["command"] = where["command"].replace(spelled, "***")
    groups: dict[tuple[str, str | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((str(run.level), run.arm), []).append(run)
    arms = options["strategies"]
    rows = []
    for level, arm in product(options["levels"], arms):
        mine, first = groups[level, arm], groups[level, arms[0]]
        row = {"level": level, "arm": arm or "server's own"} | _figures(mine, options)
        ratios = [_speed(a) / _speed(b) for a, b in zip(mine, first, strict=True) if _speed(b)]
        row["to_first_arm"] = median(ratios) if ratios else None
        rows.append(row)
    return LoadReport(
        tuple(rows),
        tuple(_record(run, index, answer) for run in runs for index, answer in enumerate(run.answers)),
        server,
        options,
        {name: value for name, value in where.items() if name not in OF_THE_SERVER},
    )


def _whole(run: Run) -> list[Answer]:
    return [answer for answer in run.answers if answer.status == "ok"]


def _speed(run: Run) -> float:
    return sum(answer.num_tokens or 0 for answer in _whole(run)) / run.seconds


def _figures(runs: Sequence[Run], options: Mapping[str, Any]) -> dict[str, Any]:
    every = [answer for run in runs for answer in run.answers]
    good = [answer for run in runs for answer in _whole(run)]
    seconds = sum(run.seconds for run in runs)
    num_in, num_out = _sum(a.num_prompt_tokens for a in good), _sum(a.num_tokens for a in good)
    limits = options["ttft_limit_ms"], options["tpot_limit_ms"]
    found = {
        "num_ok": len(good),
        "num_refused": sum(a.status == "refused" for a in every),
        "num_failed": sum(a.status == "failed" for a in every),
        "num_repeated": sum(a.was_repeated for a in every),
        "duration_s": seconds,
        "input_tokens": num_in,
        "cached_tokens": _sum(a.num_cached_tokens for a in good),
        "output_tokens": num_out,
        "requests_per_second": len(good) / seconds,
        "goodput": None if limits == (None, None) else sum(_keeps(a, *limits) for a in good) / seconds,
        "output_tokens_per_second": num_out / seconds,
        "total_tokens_per_second": (num_in + num_out) / seconds,
        "concurrency_mean": sum(a.e2e_ms for a in every) / 1e3 / seconds,
        "concurrency_peak": max(_peak(run.answers) for run in runs),
        "late_ms": max(0.0, *((a.sent - a.due) * 1e3 for a in every)),
        "num_checked": sum(a.is_equal is not None for a in every),
        "num_different": sum(a.is_equal is False for a in every),
        "repeats": [{"duration_s": run.seconds, "output_tokens_per_second": _speed(run)} for run in runs],
    }
    kinds = {
        kind: [a for a in good if a.ask.kind == kind] for kind in dict.fromkeys(a.ask.kind for a in good)
    }
    by_kind = {kind: {"num_ok": len(mine)} | _of_answers(mine) for kind, mine in kinds.items()}
    return found | _of_answers(good) | {"kinds": by_kind}


def _of_answers(good: Sequence[Answer]) -> dict[str, Any]:
    """Figures that need no clock but the answers' own."""
    steps, accepted, drafted = (
        _sum(a.drafting.get(name) for a in good)
        for name in ("num_spec_steps", "num_accepted_draft_tokens", "num_draft_tokens")
    )
    passes = _sum(a.ours.get("passes") for a in good)
    return {
        "ttft_ms": _spread([a.ttft_ms for a in good if a.ttft_ms is not None]),
        "tpot_ms": _spread([a.tpot_ms for a in good if a.tpot_ms is not None]),
        "itl_ms": _spread([gap for a in good for gap in a.gaps_ms]),
        "e2e_ms": _spread([a.e2e_ms for a in good]),
        "acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_length": 1.0 + accepted / steps if steps else None,
        "tokens_per_forward": _sum(a.num_tokens for a in good) / passes if passes else None,
    }


def _sum(values: Iterable[int | None]) -> int:
    """The sum of the values that the server reported."""
    return sum(value or 0 for value in values)


def _keeps(answer: Answer, ttft_limit: float | None, tpot_limit: float | None) -> bool:
    """Whether an answer is good; one token has no time per further token."""
    return all(
        limit is None or value is None or value <= limit
        for value, limit in ((answer.ttft_ms, ttft_limit), (answer.tpot_ms, tpot_limit))
    )


def _peak(answers: Sequence[Answer]) -> int:
    """An end at the moment of a beginning counts first."""
    moments = sorted([(a.sent, 1) for a in answers] + [(a.ended, -1) for a in answers])
    return max(accumulate(change for _, change in moments))


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = np.percentile(np.array(values), (50, 95, 99))
    return {"mean": float(np.mean(values))} | dict(
        zip(("median", "p95", "p99"), map(float, found), strict=True)
    )


def _record(run: Run, index: int, answer: Answer) -> dict[str, Any]:
    ids = answer.token_ids
    return {
        "level": str(run.level),
        "arm": run.arm,
        "repeat": run.repeat,
        "index": index,
        "kind": answer.ask.kind,
        "seed": answer.seed,
        "max_tokens": answer.ask.max_tokens,
        "sent_s": answer.sent - run.started,
        "late_ms": (answer.sent - answer.due) * 1e3,
        "status": answer.status,
        "reason": answer.reason,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.num_prompt_tokens,
        "cached_tokens": answer.num_cached_tokens,
        "tokens": answer.num_tokens,
        "chunks": len(answer.times),
        "ttft_ms": answer.ttft_ms,
        "tpot_ms": answer.tpot_ms,
        "e2e_ms": answer.e2e_ms,
        "drafts": answer.drafting.get("num_draft_tokens"),
        "accepted": answer.drafting.get("num_accepted_draft_tokens"),
        "passes": answer.ours.get("passes"),
        "output": None if ids is None else hashlib.blake2b(repr(ids).encode(), digest_size=8).hexdigest(),
        "is_equal": answer.is_equal,
    }


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
            for key in ("mean", "median", "p95", "p99"):
                yield f"{name}_{key}", None if value is None else f"{value[key]:.4f}"
        elif name not in ("repeats", "kinds"):
            yield name, f"{value:.4f}" if isinstance(value, float) else value
