"""One request to a server in OpenAI's form, timed as its answer comes."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import httpx

from orthrus.base.bench_prompts import BenchPrompt
from orthrus.base.event_stream import EventData
from orthrus.base.json_text import parse_json
from orthrus.base.text import printable
from orthrus.errors import UserInputError

Status = Literal["ok", "refused", "failed"]
LONGEST_REASON = 300


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request asks for. kind: what requests are grouped by."""

    messages: list[dict[str, str]]
    max_tokens: int
    kind: str = "other"


def asks_of(prompts: Sequence[BenchPrompt], number: int, max_tokens: Sequence[int]) -> list[Ask]:
    """So many requests, from the prompts and the limits in turn."""
    asks = []
    for i in range(number):
        prompt = prompts[i % len(prompts)]
        text = prompt.prompt
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        asks.append(Ask(messages, max_tokens[i % len(max_tokens)], prompt.domain))
    return asks


@dataclass(slots=True)
class Answer:
    """The result of a request. Times are of `perf_counter`. times: of the chunks with tokens.

    status: "refused" for a 429, "failed" for any other error, with its `reason`. due: the planned time of sending.
    token_ids, num_prompt_tokens, num_tokens: None if the server does not report them. metrics: the server's own.
    was_repeated: whether it was sent again because the server had closed the kept connection.
    """

    ask: Ask
    seed: int
    due: float
    sent: float = 0.0
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    status: Status = "ok"
    reason: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int = 0
    num_tokens: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    is_equal: bool | None = None
    was_repeated: bool = False

    @property
    def strategy(self) -> str | None:
        """How Orthrus decoded it; None behind any other server."""
        found = self.ours.get("strategy")
        return found if isinstance(found, str) else None

    @property
    def ours(self) -> dict[str, Any]:
        return _object(self.metrics.get("orthrus"))

    @property
    def drafting(self) -> dict[str, Any]:
        return _object(self.metrics.get("speculative_decoding"))

    @property
    def was_cut(self) -> bool:
        """Whether the server's clock ended it, so that it may be shorter than the same answer alone."""
        reasons = self.ours.get("finish_reasons")
        return isinstance(reasons, list) and "deadline" in reasons

    @property
    def ttft_ms(self) -> float | None:
        return (self.times[0] - self.sent) * 1e3 if self.times else None

    @property
    def tpot_ms(self) -> float | None:
        if not self.times or self.num_tokens is None or self.num_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) * 1e3 / (self.num_tokens - 1)

    @property
    def e2e_ms(self) -> float:
        return (self.ended - self.sent) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        return [(b - a) * 1e3 for a, b in zip(self.times, self.times[1:], strict=False)]

    def fail(self, reason: str) -> None:
        self.status, self.reason = "failed", " ".join(printable(reason).split())[:LONGEST_REASON]


class LoadClient:
    """Sends chats to one server. token_ids: ask for the ids of answers. timeout: seconds for a whole answer."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        model: str,
        *,
        temperature: float,
        ignore_eos: bool,
        timeout: float,
        token_ids: bool = True,
    ) -> None:
        self.model, self.token_ids = model, token_ids
        self._http, self._temperature, self._timeout = http, temperature, timeout
        self._ignore_eos = ignore_eos

    async def answer(self, ask: Ask, seed: int, strategy: str | None, due: float | None = None) -> Answer:
        """Send a request now. strategy None: without our own field. Raises nothing: the answer says what failed."""
        now = perf_counter()
        answer = Answer(ask, seed, now if due is None else due, sent=now)
        try:
            async with asyncio.timeout(self._timeout):
                await self._stream(self._body(ask, seed, strategy), answer)
        except TimeoutError:
            answer.fail(f"no answer within {self._timeout:g} seconds")
        except (httpx.HTTPError, httpx.StreamError, ValueError, TypeError) as error:
            # The last two: what came is no answer in OpenAI's form.
            answer.fail(f"{type(error).__name__}: {error}")
        answer.ended = answer.ended or perf_counter()
        return answer

    def _body(self, ask: Ask, seed: int, strategy: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": ask.messages,
            "max_tokens": ask.max_tokens,
            "temperature": self._temperature,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.token_ids:
            body["return_token_ids"] = True
        if self._ignore_eos:
            body["ignore_eos"] = True
        if strategy is not None:
            body["orthrus"] = {"strategy": strategy}
        return body

    async def _stream(self, body: dict[str, Any], answer: Answer) -> None:
        async with aclosing(await self._send(body, answer)) as response:
            if response.status_code != 200:
                await response.aread()
                answer.fail(error_of(response))
                if response.status_code == 429:
                    answer.status = "refused"
                return
            async for event in _events(response):
                _take(answer, event)
        if answer.num_tokens is None and answer.token_ids is not None:
            answer.num_tokens = len(answer.token_ids)
        if answer.finish_reason is None and answer.status == "ok":
            answer.fail("the stream ended before the answer did")

    async def _send(self, body: dict[str, Any], answer: Answer) -> httpx.Response:
        """The response with its head alone; the caller closes it."""
        connection = _Connection()
        extensions = {"trace": connection.see}
        request = self._http.build_request("POST", "chat/completions", json=body, extensions=extensions)
        try:
            return await self._http.send(request, stream=True)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
            if not connection.was_closed_unread(error):
                raise
            # Some servers close kept connections after a while: then nobody read the request.
            answer.was_repeated = True
            return await self._http.send(request, stream=True)


class _Connection:
    """Records httpx's events on the connection of a request."""

    def __init__(self) -> None:
        self._is_new = False

    async def see(self, event: str, _: Mapping[str, Any]) -> None:
        self._is_new |= event.startswith("connection.connect")

    def was_closed_unread(self, error: httpx.TransportError) -> bool:
        """Whether a connection of an earlier request was closed before anything came back."""
        is_answer = isinstance(error, httpx.RemoteProtocolError) and "without sending" not in str(error)
        return not self._is_new and not is_answer


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream. Read to its end, so that the connection can be used again."""
    reader = EventData()
    async for piece in response.aiter_text():
        for event in _objects(reader.feed(piece)):
            yield event
    for event in _objects(reader.flush()):
        yield event


def _objects(contents: Iterable[str]) -> Iterator[dict[str, Any]]:
    return (_object(parse_json(content)) for content in contents if content != "[DONE]")


def _take(answer: Answer, event: Mapping[str, Any]) -> None:
    """Add the content of an event to an answer."""
    now = perf_counter()
    if event.get("error"):
        answer.fail(_message(event) or "an error without a message")
    for choice in map(_object, event.get("choices") or ()):
        delta = _object(choice.get("delta"))
        ids = choice.get("token_ids")
        if ids:
            answer.token_ids = (answer.token_ids or []) + ids
        if ids or any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls")):
            answer.times.append(now)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    if usage := _object(event.get("usage")):
        answer.num_prompt_tokens = usage.get("prompt_tokens")
        answer.num_tokens = usage.get("completion_tokens")
        answer.num_cached_tokens = _object(usage.get("prompt_tokens_details")).get("cached_tokens") or 0
    answer.metrics |= _object(event.get("metrics"))
    answer.ended = now


async def served_model(http: httpx.AsyncClient, url: str) -> dict[str, Any]:
    """What the server says of its first model. Raises UserInputError where nobody answers, or not with a model."""
    try:
        response = await http.get("models", timeout=30.0)
    except httpx.HTTPError as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserInputError(
            f"no server answers at {url} ({reason[:LONGEST_REASON]}); start one with `orthrus serve`, or give its "
            "address as --url."
        ) from error
    if response.status_code in (401, 403):
        raise UserInputError(f"the server at {url} wants a key; give it as --api-key.")
    if response.status_code != 200:
        raise UserInputError(
            f"the server at {url} does not list its model ({error_of(response)}); wait until it is ready, or give "
            "--model."
        )
    try:
        return _object(parse_json(response.content)["data"][0])
    except (ValueError, LookupError, TypeError) as error:
        raise UserInputError(f"the server at {url} lists no model; give its name as --model.") from error


def error_of(response: httpx.Response) -> str:
    """Status and message of a response that has been read."""
    try:
        message = _message(_object(parse_json(response.content)))
    except ValueError:
        message = response.text
    return f"{response.status_code} {' '.join(message.split())}".strip()[:LONGEST_REASON]


def _message(body: Mapping[str, Any]) -> str:
    error = body.get("error")
    return (
        str(error.get("message", "")) if isinstance(error, Mapping) else str(error or body.get("message", ""))
    )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
