"""The thread that steps the engine, and its connection to the event loop."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic, sleep
from typing import Protocol

from orthrus.api import Orthrus
from orthrus.engine.request import Request
from orthrus.server.calls import Call, Job
from orthrus.server.errors import ApiError, bad_request, not_ready, overloaded
from orthrus.server.settings import ServeConfig
from orthrus.types import Cycle

log = logging.getLogger("orthrus.server")
Ended = Callable[[Call, int, Request], None]


class IdleWork(Protocol):
    """Work that the engine's thread does in short steps while there is no request."""

    @property
    def has_work(self) -> bool: ...

    def step(self) -> None:
        """Must not raise."""
        ...


class EngineLoop:
    """Steps an engine in one thread while there is work, and counts the places that answers take.

    Create and use it in the event loop. on_ended: called there for each answer that the engine was given. idle: work
    for the thread while the engine has none; call `wake` when there is some. on_death: called there if the thread has
    failed, after all calls got the error. Only `admit` takes places, and only
    `_ended` gives them back.
    """

    def __init__(
        self,
        orthrus: Orthrus,
        config: ServeConfig,
        on_ended: Ended | None = None,
        idle: IdleWork | None = None,
        on_death: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self.orthrus, self.config, self._idle_work = orthrus, config, idle
        self._on_death = on_death
        self.draining = False
        self.calls: set[Call] = set()
        self.num_open = 0
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._has_work = threading.Condition()
        self._stopping = False
        self._num_closed = 0
        self._idle = asyncio.Event()
        self._idle.set()
        # Rendering, tokenising and compiling grammars would block the event loop for too long.
        self._preparing = ThreadPoolExecutor(4, thread_name_prefix="orthrus-prepare")
        self._thread = threading.Thread(target=self._run, name="orthrus-engine", daemon=True)
        self._thread.start()

    def admit(self, num_answers: int) -> Call:
        """Reserve places for so many answers. Raises ApiError if there are too few, or if the server is shutting
        down.
        """
        if self.draining:
            raise not_ready("draining")
        if num_answers > self.config.num_places:
            raise bad_request(
                f"The request asks for {num_answers} texts, but the server has {self.config.num_places} places: "
                "ask for fewer.",
                param="n",
            )
        if self.num_open + num_answers > self.config.num_places:
            raise overloaded()
        call = Call(num_answers, self.config.max_unread, self.orthrus.engine.cancel)
        self.num_open += num_answers
        self.calls.add(call)
        self._idle.clear()
        return call

    async def submit(self, call: Call, prepare: Callable[[], list[Job]]) -> list[Job]:
        """Prepare the call's jobs and submit them to the engine, in another thread. Returns the jobs.

        Raises what `prepare` and the engine raise. All places of the call come back in the end, whatever happens, even
        if nobody waits any more.
        """
        work = self._loop.run_in_executor(self._preparing, self._submit, call, prepare)
        return await asyncio.shield(work)

    def _submit(self, call: Call, prepare: Callable[[], list[Job]]) -> list[Job]:
        num_given = 0
        try:
            jobs = [] if call.cancelled else prepare()
            for index, job in enumerate(jobs):
                if call.cancelled:
                    break
                request = self.orthrus.submit(
                    job.prompt_ids,
                    job.config,
                    on_cycle=partial(self._cycle_came, call, index),
                    on_end=partial(self._request_closed, call, index),
                    deadline=call.arrived + self.config.timeout,
                )
                num_given += 1
                call.attach(index, request)
                self.wake()
            return jobs
        except BaseException:
            self._call_in_loop(call.cancel)
            raise
        finally:
            for _ in range(call.num_answers - num_given):
                self._call_in_loop(self._ended, call, None, None)

    def _cycle_came(self, call: Call, index: int, cycle: Cycle) -> None:
        """Called in the engine's thread."""
        self._call_in_loop(call.take, index, cycle, monotonic())

    def _request_closed(self, call: Call, index: int, request: Request) -> None:
        """Called in the engine's thread."""
        self._num_closed += 1
        self._call_in_loop(self._ended, call, index, request)

    def _call_in_loop(self, function: Callable[..., object], *args: object) -> None:
        """Call a function in the event loop. Does nothing if the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            log.debug("the event loop is closed")

    def _ended(self, call: Call, index: int | None, request: Request | None) -> None:
        self.num_open -= 1
        try:
            if request is not None and index is not None and self._on_ended is not None:
                self._on_ended(call, index, request)
        finally:
            call.end(None if request is None else _failure(request))
            if call.ended:
                self.calls.discard(call)
            if self.num_open == 0:
                self._idle.set()

    def wake(self) -> None:
        """Wake the engine's thread, because there is work or idle work. May be called from any thread."""
        with self._has_work:
            self._has_work.notify()

    def _run(self) -> None:
        """The engine's thread. If it fails outside of a pass, no request can end any more, so the server stops."""
        try:
            self._serve()
        except BaseException as error:
            log.exception("the engine's thread failed")
            self._call_in_loop(self._died, error)

    def _died(self, error: BaseException) -> None:
        self.draining = True
        for call in list(self.calls):
            call.cancel(error)
        self._on_death(error)

    def _serve(self) -> None:
        engine, idle = self.orthrus.engine, self._idle_work
        while True:
            with self._has_work:
                while not (self._stopping or engine.has_work or (idle is not None and idle.has_work)):
                    self._has_work.wait()
                if self._stopping:
                    return
            if idle is not None and not engine.has_work:
                idle.step()
                continue
            num_closed = self._num_closed
            try:
                engine.step()
            except Exception as error:
                log.exception("a pass failed")
                if self._num_closed == num_closed:
                    self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """End all requests. No single request caused the error, so the next step would fail in the same way."""
        for call in list(self.calls):
            for request in call.requests:
                if request is not None and not request.closed:
                    request.failure = error
                    self.orthrus.engine.drop(request)
        # Requests that are not attached yet fail in a later step. The pause keeps the thread from spinning until then.
        sleep(0.05)

    async def drain(self, seconds: float) -> None:
        """Accept no more requests, wait for the open ones, and end those that are left after so many seconds."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            self.end_all()
            await self._idle.wait()

    def end_all(self) -> None:
        """End every open answer before the next pass. Its reader gets the reason."""
        self.draining = True
        for call in list(self.calls):
            call.cancel(
                ApiError(503, "The server is shutting down.", code="server_shutting_down", retry_after=5.0)
            )

    def close(self) -> None:
        """Stop the thread after the pass in flight."""
        with self._has_work:
            self._stopping = True
            self._has_work.notify()
        self._thread.join(30.0)
        self._preparing.shutdown(wait=False, cancel_futures=True)


def _failure(request: Request) -> BaseException | None:
    """The error of a request without an answer, or with an answer that was cut off; None if it ended well."""
    if request.failure is not None:
        return request.failure
    if request.finish == "deadline" and not request.token_ids:
        return ApiError(504, "The request took too long.", code="deadline_exceeded")
    if request.finish is None or request.finish == "cancelled":
        return ApiError(503, "The request was cancelled.", code="cancelled", retry_after=1.0)
    return None
