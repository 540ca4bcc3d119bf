"""One HTTP request while the engine answers it. The records of its answers arrive in one bounded queue."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from time import monotonic

from orthrus.config import DecodeConfig
from orthrus.engine.request import Request
from orthrus.server.errors import ApiError
from orthrus.server.origin import Origin
from orthrus.types import Cycle


@dataclass(frozen=True, slots=True)
class Job:
    """One text to write."""

    prompt_ids: list[int]
    config: DecodeConfig


@dataclass(slots=True)
class Times:
    """The times at which the tokens of one answer arrived, in seconds of `time.monotonic`.

    gaps: times between records with tokens.
    """

    first: float | None = None
    last: float | None = None
    gaps: list[float] = field(default_factory=list)

    def see(self, cycle: Cycle, now: float) -> None:
        if not cycle.token_ids:
            return
        if self.last is not None:
            self.gaps.append(now - self.last)
        self.first, self.last = self.first or now, now


class Call(AsyncIterator[tuple[int, Cycle]]):
    """The answers to one HTTP request. Iterate for (index of the answer, record), in order of arrival.

    The iteration ends when all answers have ended. It raises the error that ended one of them. All methods belong to
    the event loop, except `attach`, which the submitting thread calls.
    """

    def __init__(self, num_answers: int, max_unread: int, cancel: Callable[[Request], None]) -> None:
        self.arrived = monotonic()
        self.num_answers = num_answers
        self.times = [Times() for _ in range(num_answers)]
        self.requests: list[Request | None] = [None] * num_answers
        self.cancelled = False
        self.origin: Origin | None = None
        self._left, self._max_unread, self._cancel = num_answers, max_unread, cancel
        self._events: deque[tuple[int, Cycle]] = deque()
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether the engine is done with all answers."""
        return self._left == 0

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the call, if there was one."""
        return self._failure

    def attach(self, index: int, request: Request) -> None:
        """Attach a request; called by the thread that submitted it. If the call was cancelled in between, the
        request is too.
        """
        self.requests[index] = request
        if self.cancelled:
            self._cancel(request)

    def take(self, index: int, cycle: Cycle, now: float) -> None:
        """Add a record. If too many are unread, the call is cancelled, because the engine does not wait for readers."""
        self.times[index].see(cycle, now)
        if self.cancelled:
            return
        if len(self._events) >= self._max_unread:
            self.cancel(ApiError(408, "The answer was not read fast enough.", code="slow_reader"))
            # A reader that has stalled would keep them in memory for as long as its connection lasts.
            self._events.clear()
            return
        self._events.append((index, cycle))
        self._wake.set()

    def end(self, failure: BaseException | None) -> None:
        """Record that one of the answers has ended; called once for each."""
        self._left -= 1
        if failure is not None:
            self.cancel(failure)
        self._wake.set()

    def cancel(self, reason: BaseException | None = None) -> None:
        """End all answers before the next pass. A reader gets the reason as an error."""
        if self._failure is None:
            self._failure = reason
        if not self.cancelled:
            self.cancelled = True
            for request in self.requests:
                if request is not None and not request.closed:
                    self._cancel(request)
        self._wake.set()

    async def __anext__(self) -> tuple[int, Cycle]:
        while True:
            if self._events:
                return self._events.popleft()
            if self._failure is not None:
                raise self._failure
            if self._left == 0 or self.cancelled:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
