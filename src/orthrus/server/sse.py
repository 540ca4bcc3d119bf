"""Responses that notice when their client disconnects: event streams and whole answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
PING = b": keepalive\n\n"


def event(body: dict[str, Any], name: str | None = None) -> bytes:
    """One event of a stream."""
    named = b"" if name is None else f"event: {name}\n".encode("ascii")
    return (
        named
        + b"data: "
        + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        + b"\n\n"
    )


class EventStream(Response):
    """Sends what `events` yields, and a comment after each `keepalive` seconds of silence.

    on_end: called once when the stream ends: complete, failed, or with the client gone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None], *, keepalive: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end, self._keepalive = events, on_end, keepalive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await first_of(self._send_all(send), gone(receive))
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        waiting: asyncio.Task[bytes] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(self._events))
                done, _ = await asyncio.wait({waiting}, timeout=self._keepalive)
                if not done:
                    await _body(send, PING)
                    continue
                try:
                    piece = waiting.result()
                except StopAsyncIteration:
                    break
                waiting = None
                await _body(send, piece)
        finally:
            if waiting is not None:
                waiting.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(send: Send, piece: bytes) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": True})


async def gone(receive: Receive) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`. If the client disconnects first, `work` is cancelled and the result is None."""
    return await first_of(work, gone(request.receive))


async def first_of(work: Awaitable[T], end: Awaitable[None]) -> T | None:
    """The result of `work`, or None if `end` comes first. The other one is cancelled, and has ended on return."""
    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(end)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
