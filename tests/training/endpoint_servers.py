"""Servers for the tests of `orthrus synth --endpoint`: ours, in a loop of its own, and scripted ones."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
from tests.server.conftest import serving

from orthrus.api import Orthrus

T = TypeVar("T")


class Bridge(httpx.AsyncBaseTransport):
    """Carries requests of one event loop to an app that runs in another; keeps their bodies."""

    def __init__(self, loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
        self._loop, self._client = loop, client
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        there = self._client.request(
            request.method, request.url.path, content=request.content, headers=request.headers
        )
        reply = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(there, self._loop))
        return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)

    def bodies(self, path: str = "/v1/completions") -> list[dict[str, Any]]:
        return [json.loads(r.content) for r in self.requests if r.url.path == path]


@contextmanager
def served(orthrus: Orthrus) -> Iterator[Bridge]:
    """Our own server around a model, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def there(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    # Entered and left by one task, as its scopes want.
    ready: asyncio.Future[httpx.AsyncClient]
    done: asyncio.Event

    async def life() -> None:
        async with serving(orthrus) as client:
            ready.set_result(client)
            await done.wait()

    async def begun() -> httpx.AsyncClient:
        nonlocal ready, done
        ready, done = loop.create_future(), asyncio.Event()
        living.append(asyncio.ensure_future(life()))
        return await ready

    async def ended() -> None:
        done.set()
        await living[0]

    living: list[asyncio.Future[None]] = []
    try:
        yield Bridge(loop, there(begun()))
        there(ended())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Scripted(httpx.AsyncBaseTransport):
    """Answers as `script` says, which sees each request to write something; lists one model, has no version."""

    def __init__(self, script: Callable[[httpx.Request], httpx.Response]) -> None:
        self._script = script
        self.asked: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            if request.url.path == "/v1/models":
                return httpx.Response(200, json={"data": [{"id": "served"}]})
            return httpx.Response(404)
        self.asked.append(request)
        return self._script(request)


def written(text: str = "", finish: str = "stop", **choice: Any) -> httpx.Response:
    """A reply of /v1/completions."""
    return httpx.Response(200, json={"choices": [{"text": text, "finish_reason": finish} | choice]})


def said(text: str, finish: str = "stop", **message: Any) -> httpx.Response:
    """A reply of /v1/chat/completions."""
    choice = {"message": {"role": "assistant", "content": text} | message, "finish_reason": finish}
    return httpx.Response(200, json={"choices": [choice]})


def refused(status: int, message: str = "no", **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}}, headers=headers)
