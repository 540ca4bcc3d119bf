"""The audit of live traffic: it decodes a share of the answers again with plain decoding while no request waits."""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from threading import Lock
from typing import Any

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from torch import Tensor

from orthrus.api import Orthrus
from orthrus.audit.explain import Judgement
from orthrus.audit.plain import Answered, PlainReplay
from orthrus.engine.beside import EngineBeside
from orthrus.engine.request import Request
from orthrus.model.passes import Pass
from orthrus.model.pool import SlotPool
from orthrus.model.runner import Runner, RunnerAround
from orthrus.server.calls import Call

log = logging.getLogger("orthrus.server")
MOST_WAITING = 64
"""Limit on the answers that wait for their replay. Further ones are dropped and counted."""
MOST_KEPT = 100
"""Differences that are kept for GET /audit/{id}."""
AROUND = 8
"""Tokens of the answer that are kept on either side of a difference."""
SCRATCH = 1024
"""Slots beyond a whole context for the rows of one pass, when an answer is decoded again as it was at first."""

COUNTERS = {
    "checked": "Answers that were decoded again with plain decoding.",
    "identical": "Of these, answers with the very same tokens.",
    "near_tie": "Of these, answers that differ where rounding decides.",
    "violation": "Of these, answers that break the rule.",
    "dropped": "Answers that were chosen for the audit and not decoded again.",
}
"""The counters of the audit of live traffic, for Prometheus."""


@dataclass(slots=True)
class Counts:
    """checked: replays that ended. Each of them is identical, near_tie (rounding decided) or violation (a broken rule).

    dropped: answers that were chosen and could not be replayed.
    """

    checked: int = 0
    identical: int = 0
    near_tie: int = 0
    violation: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class _Chosen:
    request_id: str
    index: int
    answered: Answered


class LiveAudit(Collector):
    """Replays a share of finished answers by plain decoding, and keeps evidence of those that differ.

    Call `offer` in the event loop. The engine's thread calls `step` while `has_work` is true and the engine has no
    work. Other methods may be called from any thread. share: from 0 (none) to 1 (all). on_offer: called after an answer
    was chosen.
    """

    def __init__(
        self,
        orthrus: Orthrus,
        share: float,
        on_offer: Callable[[], None] = lambda: None,
        *,
        most: int = MOST_WAITING,
    ) -> None:
        self.share, self.counts = share, Counts()
        self._orthrus, self._on_offer, self._most = orthrus, on_offer, most
        # Explaining a difference takes many passes. Before each of them it gives way to requests.
        self._giving_way = copy(orthrus)
        self._giving_way.engine = EngineBeside(
            orthrus.engine,
            _GivingWay(orthrus.engine.runner, lambda: self._stopped or orthrus.engine.has_work),
            max_slots=orthrus.engine.context_length + SCRATCH,
        )
        self._numbers, self._ids = count(), count(1)
        self._waiting: deque[_Chosen] = deque()
        self._current: _Chosen | None = None
        self._replay: PlainReplay | None = None
        self._kept: deque[dict[str, Any]] = deque(maxlen=MOST_KEPT)
        self._lock = Lock()
        self._stopped = False

    @property
    def has_work(self) -> bool:
        return not self._stopped and (self._current is not None or bool(self._waiting))

    def stop(self) -> None:
        """Stop the replay in progress within one pass, and drop those that wait; the server is shutting down."""
        self._stopped = True

    def offer(self, call: Call, index: int, request: Request) -> None:
        """Offer an answer that has ended. Some are chosen, by a hash of the request's id and a running number."""
        if not self.share or not request.is_answer or not request.token_ids:
            return
        request_id = "" if call.origin is None else call.origin.request_id
        if not is_chosen(request_id, next(self._numbers), self.share):
            return
        if len(self._waiting) >= self._most:
            self._count("dropped")
            return
        self._waiting.append(_Chosen(request_id, index, Answered.of(request)))
        self._on_offer()

    def step(self) -> None:
        """Run one pass of a replay, or judge a difference.

        If a request arrives during a judgement, the judgement starts again later.
        """
        try:
            with self._orthrus.engine.held():
                self._step()
        except _WorkCame:
            return
        except Exception:
            log.exception("a replay failed")
            self._count("dropped")
            self._current = self._replay = None

    def _step(self) -> None:
        if self._current is None:
            self._current = self._waiting.popleft()
        if self._replay is None:
            self._replay = PlainReplay(self._orthrus, self._current.answered)
        if not self._replay.done:
            self._replay.step()
            return
        if self._replay.difference is None:
            self._count("checked", "identical")
        else:
            judged = self._replay.explain(self._giving_way)
            self._keep(self._current, self._replay, judged)
        self._current = self._replay = None

    def _count(self, *names: str) -> None:
        with self._lock:
            for name in names:
                setattr(self.counts, name, getattr(self.counts, name) + 1)

    def _keep(self, chosen: _Chosen, replay: PlainReplay, judged: Judgement) -> None:
        self._count("checked", "near_tie" if judged.verdict == "near-tie" else "violation")
        evidence = _evidence(chosen, replay, judged) | {"id": str(next(self._ids))}
        with self._lock:
            self._kept.append(evidence)
        if judged.verdict != "near-tie":
            named = {name: evidence[name] for name in ("id", "request_id", "position", "strategy")}
            log.error("an answer is not what plain decoding gives", extra={"data": {"audit": named}})

    def summary(self) -> dict[str, Any]:
        """Share, counts, and one line per difference, the latest first."""
        with self._lock:
            kept, counts = list(self._kept), asdict(self.counts)
        names = ("id", "request_id", "time", "strategy", "position", "verdict")
        return {
            "object": "orthrus.audit",
            "share": self.share,
            **counts,
            "waiting": len(self._waiting),
            "differences": [{name: each[name] for name in names} for each in reversed(kept)],
        }

    def evidence(self, name: str) -> dict[str, Any] | None:
        """The stored evidence of a difference; None if it is not stored, or no longer."""
        with self._lock:
            return next((each for each in self._kept if each["id"] == name), None)

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"orthrus_audit_{name}", text, getattr(self.counts, name))


def is_chosen(request_id: str, number: int, share: float) -> bool:
    """Whether the number-th answer belongs to the share: a function of its arguments alone."""
    found = hashlib.blake2b(f"{number}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(found) < share * 2**64


def _evidence(chosen: _Chosen, replay: PlainReplay, judged: Judgement) -> dict[str, Any]:
    """The evidence of a difference: numbers and a few token ids of the answer, and nothing of the prompt."""
    answered, position = chosen.answered, replay.difference
    assert position is not None
    sampling, first = answered.config.sampling, max(position - AROUND, 0)
    plain_ids, our_ids = replay.token_ids, answered.token_ids
    return {
        "request_id": chosen.request_id,
        "index": chosen.index,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "strategy": answered.config.strategy,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "finish_reason": answered.finish,
        "num_prompt_tokens": len(answered.prompt_ids),
        "num_tokens": len(our_ids),
        "position": position,
        "first_shown": first,
        "plain_ids": list(plain_ids[first : position + AROUND + 1]),
        "our_ids": list(our_ids[first : position + AROUND + 1]),
        **asdict(judged),
    }


class _WorkCame(Exception):  # noqa: N818  (no error: a pass gives way)
    """A request arrived during a judgement."""


class _GivingWay(RunnerAround):
    """A runner that runs no pass while there is work: raises `_WorkCame` instead."""

    def __init__(self, runner: Runner, has_work: Callable[[], bool]) -> None:
        super().__init__(runner)
        self._has_work = has_work

    def hidden(self, p: Pass, pool: SlotPool) -> Tensor:
        if self._has_work():
            raise _WorkCame
        return super().hidden(p, pool)
