"""A server as the partner of a chat. It needs OpenAI's API; our own server gives more statistics."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from orthrus.base.addresses import api_root
from orthrus.base.event_stream import event_data
from orthrus.base.json_text import parse_json
from orthrus.base.prompt import check_text
from orthrus.base.web_client import open_client
from orthrus.cli.chat_partner import Answering, Messages
from orthrus.cli.common import need_serve
from orthrus.cli.options import KEY_VARIABLE
from orthrus.cli.render import DraftMarker
from orthrus.config import DecodeConfig
from orthrus.errors import OrthrusError, UserInputError
from orthrus.types import Cycle, DecodeStats, FinishReason, GenerationResult

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS, SILENT_SECONDS = 10.0, 600.0
_OURS = ("strategy", "block_size", "node_budget", "block_budget", "copies")
_DEFAULTS = {field.name: field.default for field in fields(DecodeConfig) if field.default is not MISSING}


class ServerPartner:
    """A model behind a server. url: with or without /v1. model: its name there, None for the only one there is.

    Raises UserInputError for a wrong address, a server that does not answer, and a model that must be named;
    MissingExtraError without httpx.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        self._url = api_root(url, "--url")
        self._client = _client(self._url, api_key)
        found = self._models(may_fail=model is not None)
        ours = [each for each in found if each.get("owned_by") == "orthrus"]
        self._is_ours = bool(ours)
        names = [str(each["id"]) for each in found if "id" in each]
        if model is None and len(names) != 1:
            shown = ", ".join(names[:10]) or "none"
            raise UserInputError(f"{self._url} lists the models {shown}; name the one to talk to.")
        self._model = model or names[0]
        self._context = ours[0].get("max_model_len") if ours else None

    def _models(self, *, may_fail: bool) -> list[dict[str, Any]]:
        import httpx

        url = f"{self._url}/models"
        try:
            response = self._client.get(url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _no_connection(url, error) from error
        if may_fail and response.status_code == 404:
            return []
        _check_status(response)
        try:
            return [dict(each) for each in parse_json(response.content)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserInputError(
                f"{url} does not list models as OpenAI's interface does; check --url."
            ) from error

    def answer(self, messages: Messages, decode: dict[str, Any]) -> Answering:
        for message in messages:
            check_text(str(message["content"]), "A message")
        return _Stream(self._client, f"{self._url}/chat/completions", self._body(messages, decode))

    def _body(self, messages: Messages, decode: dict[str, Any]) -> dict[str, Any]:
        """The request. Fields with their default value are left out, because not every server knows them."""
        if not decode["floor"]:
            raise UserInputError("a server decides about the floor itself; drop --no-floor.")
        body: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "max_tokens": decode["max_new_tokens"],
            "temperature": decode["temperature"],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body |= {n: decode[n] for n in ("top_k", "top_p", "min_p", "seed") if decode[n] is not None}
        if decode["repetition_penalty"] != 1.0:
            body["repetition_penalty"] = decode["repetition_penalty"]
        if decode["logit_bias"]:
            body["logit_bias"] = {str(token_id): bias for token_id, bias in decode["logit_bias"].items()}
        if decode["stop"]:
            body["stop"] = list(decode["stop"])
        if decode["ignore_eos"]:
            body["ignore_eos"] = True
        if self._is_ours:
            body |= {"return_token_ids": True, "orthrus": {name: decode[name] for name in _OURS}}
        elif changed := [name for name in _OURS if decode[name] != _DEFAULTS[name]]:
            raise UserInputError(f"{self._url} is no server of Orthrus: {changed[0]} cannot be chosen there.")
        return body

    def marker(self) -> DraftMarker:
        raise UserInputError("tokens that were drafted are marked without --url only; drop --color.")

    def check_compare(self) -> None:
        if not self._is_ours:
            raise UserInputError(
                f"{self._url} is no server of Orthrus, so there is nothing to compare; drop --compare."
            )

    def header(self) -> list[tuple[str, str]]:
        rows = [("server", self._url), ("model", self._model)]
        return rows if self._context is None else [*rows, ("context", f"{self._context} tokens")]

    def describe(self) -> dict[str, Any]:
        return {"model": self._model, "url": self._url}


class _Stopped(Exception):  # noqa: N818  (no error: the user asked for it)
    """Ctrl-C during the sending of a request."""


class _Stream(Iterator[Cycle]):
    """An answer that arrives in chunks. The last ones hold the server's statistics. Times are the client's."""

    def __init__(self, client: "httpx.Client", url: str, body: dict[str, Any]) -> None:
        self._client, self._url, self._body = client, url, body
        self._cycles: list[Cycle] = []
        self._usage: dict[str, Any] = {}
        self._metrics: dict[str, Any] = {}
        self._finish: str | None = None
        self._opening = self._cancelled = False
        self._response: httpx.Response | None = None
        self._start = self._first = self._end = perf_counter()
        self._records = self._run()

    def __next__(self) -> Cycle:
        return next(self._records)

    def cancel(self) -> None:
        self._cancelled = True
        if self._opening:
            raise _Stopped
        # This ends a read that waits for the next chunk.
        stream = None if self._response is None else self._response.extensions.get("network_stream")
        connection = None if stream is None else stream.get_extra_info("socket")
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _run(self) -> Iterator[Cycle]:
        import httpx

        self._start = self._first = perf_counter()
        try:
            self._opening = True
            if self._cancelled:
                raise _Stopped
            with self._client.stream("POST", self._url, json=self._body) as response:
                self._response, self._opening = response, False
                _check_status(response)
                yield from self._read(response)
        except _Stopped:
            pass
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            if not self._cancelled:
                raise _no_connection(self._url, error) from error
        finally:
            self._opening = False
            self._end = perf_counter()

    def _read(self, response: "httpx.Response") -> Iterator[Cycle]:
        num_events, is_whole = 0, False
        for data in event_data(response.iter_text()):
            is_whole = data == "[DONE]"
            if self._cancelled or is_whole:
                break
            num_events += 1
            cycle = self._take(_event(data, self._url))
            if cycle is not None:
                if not self._cycles:
                    self._first = perf_counter()
                self._cycles.append(cycle)
                yield cycle
        if not num_events and not self._cancelled:
            raise OrthrusError(f"{self._url} sent no events of a stream; check --url.")
        if not is_whole and self._finish is None and not self._cancelled:
            raise OrthrusError(
                f"{self._url} broke off before the answer was complete; send the message again."
            )

    def _take(self, event: dict[str, Any]) -> Cycle | None:
        """The text of an event as a record. Its statistics are stored."""
        self._usage = _object(event.get("usage")) or self._usage
        self._metrics = _object(event.get("metrics")) or self._metrics
        choices = event.get("choices")
        choice = _object(choices[0]) if isinstance(choices, list) and choices else {}
        self._finish = choice.get("finish_reason") or self._finish
        text = _object(choice.get("delta")).get("content") or ""
        ids = tuple(choice.get("token_ids") or ())
        if not text and not ids:
            return None
        return Cycle(
            index=len(self._cycles),
            kind="ar",
            text=str(text),
            token_ids=ids,
            is_draft=(False,) * len(ids),
            num_drafted=0,
            num_accepted=0,
            num_passes=0,
            num_rows=0,
            elapsed_ms=0.0,
        )

    @property
    def result(self) -> GenerationResult:
        ids = tuple(token_id for cycle in self._cycles for token_id in cycle.token_ids)
        finish = "cancelled" if self._cancelled else self._finish or "stop"
        return GenerationResult(
            text="".join(cycle.text for cycle in self._cycles),
            token_ids=ids,
            finish_reason=cast(FinishReason, finish),
            stats=self._stats(len(ids) or len(self._cycles)),
            cycles=tuple(self._cycles),
        )

    def _stats(self, num_seen: int) -> DecodeStats:
        """num_seen: received tokens, or pieces of text. It is used if the server sent no usage."""
        ours, drafts = (_object(self._metrics.get(name)) for name in ("orthrus", "speculative_decoding"))
        return DecodeStats(
            num_prompt_tokens=_number(self._usage, "prompt_tokens"),
            num_tokens=_number(self._usage, "completion_tokens") or num_seen,
            num_passes=_number(ours, "passes"),
            num_prefill_passes=0,
            num_rows=0,
            num_cycles=_number(ours, "cycles") or _number(drafts, "num_spec_steps"),
            num_drafted=_number(drafts, "num_draft_tokens"),
            num_accepted=_number(drafts, "num_accepted_draft_tokens"),
            accepted_histogram=(),
            ttft_ms=(self._first - self._start) * 1e3,
            decode_ms=(self._end - self._first) * 1e3,
            num_copied=_number(ours, "copied_tokens"),
            num_cached_tokens=_number(ours, "cached_tokens"),
        )


def _event(data: str, url: str) -> dict[str, Any]:
    try:
        event = _object(parse_json(data))
    except ValueError as error:
        raise OrthrusError(f"{url} sent an event that is no JSON; check --url.") from error
    if event.get("error"):
        raise OrthrusError(f"{url} broke off: {_reason(event)}")
    return event


def _client(url: str, api_key: str | None) -> "httpx.Client":
    need_serve("a chat with a server", "httpx")
    import httpx

    timeout = httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS)
    return open_client(httpx.Client, [url], api_key, timeout=timeout)


def _check_status(response: "httpx.Response") -> None:
    """Raises UserInputError for an error status, with the server's own message if there is one."""
    if response.is_success:
        return
    response.read()
    try:
        reason = _reason(_object(parse_json(response.content)))
    except ValueError:
        reason = response.reason_phrase
    hint = f"; give --api-key, or {KEY_VARIABLE}" if response.status_code in (401, 403) else ""
    raise UserInputError(f"{response.url} answers {response.status_code}: {reason.rstrip('.')}{hint}.")


def _reason(body: dict[str, Any]) -> str:
    error = body.get("error", body.get("detail"))
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message or "no reason is given.").split())[:500]


def _no_connection(url: str, error: Exception) -> OrthrusError:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return UserInputError(f"no answer from {url} ({reason[:200]}); check --url, or start `orthrus serve`.")


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    return value if type(value) is int else 0
