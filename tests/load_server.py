"""A server in OpenAI's form that is a function: for tests of what drives servers."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx


class Served(httpx.AsyncBaseTransport):
    """Answers each chat with `max_tokens` ids, three a chunk; notes the bodies, and how many were open at once.

    ids: from a body and the request's number. status: from the request's number, 200 for an answer. tells: what
    kind of server it is.
    """

    def __init__(
        self,
        *,
        ids: Callable[[dict[str, Any], int], list[int]] | None = None,
        status: Callable[[int], int] = lambda number: 200,
        has_ids: bool = True,
        has_usage: bool = True,
        is_orthrus: bool = True,
        is_strict: bool = False,
        delay: float = 0.0,
        key: str | None = None,
    ) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.num_open = self.most_open = 0
        self._ids = ids or (lambda body, number: list(range(body["max_tokens"])))
        self._status, self._has_ids, self._has_usage = status, has_ids, has_usage
        self._is_orthrus, self._is_strict, self._delay, self._key = is_orthrus, is_strict, delay, key

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self._key is not None and request.headers.get("authorization") != f"Bearer {self._key}":
            return _error(401, "no key")
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "tiny", "max_model_len": 256}]})
        body = json.loads(request.content)
        number = len(self.bodies)
        self.bodies.append(body)
        if self._is_strict and "return_token_ids" in body:
            return _error(400, "unknown field return_token_ids")
        if (status := self._status(number)) != 200:
            return _error(status, "not now")
        return httpx.Response(200, stream=_Stream(self, self._events(body, number)))

    def _events(self, body: dict[str, Any], number: int) -> Iterator[dict[str, Any]]:
        yield {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        ids = self._ids(body, number)
        for at in range(0, len(ids), 3):
            choice: dict[str, Any] = {"delta": {"content": "abc"}}
            if self._has_ids and body.get("return_token_ids"):
                choice["token_ids"] = ids[at : at + 3]
            yield {"choices": [choice]}
        yield {"choices": [{"delta": {}, "finish_reason": "length"}]}
        last: dict[str, Any] = {"choices": []}
        if self._has_usage:
            last["usage"] = {"prompt_tokens": 7, "completion_tokens": len(ids)}
        if self._is_orthrus:
            strategy = (body.get("orthrus") or {}).get("strategy", "auto")
            drafting = {"num_spec_steps": 2, "num_accepted_draft_tokens": 3, "num_draft_tokens": 6}
            last["metrics"] = {"orthrus": {"strategy": strategy, "passes": 4}}
            if strategy != "ar":
                last["metrics"]["speculative_decoding"] = drafting
        yield last

    async def pause(self) -> None:
        await asyncio.sleep(self._delay)


class _Stream(httpx.AsyncByteStream):
    def __init__(self, served: Served, events: Iterator[dict[str, Any]]) -> None:
        self._served, self._events = served, events

    async def __aiter__(self) -> Any:
        served = self._served
        served.num_open += 1
        served.most_open = max(served.most_open, served.num_open)
        try:
            yield b": keepalive\n\n"
            for event in self._events:
                await served.pause()
                yield b"data: " + json.dumps(event).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
        finally:
            served.num_open -= 1


def _error(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}})
