"""Answers in the formats of OpenAI's chat and completion APIs, whole and as events."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orthrus.server.call_reader import CallPiece, CallReader, Piece
from orthrus.server.errors import ApiError
from orthrus.server.figures import TextRecords, finish_reason, metrics, provenance, usage
from orthrus.server.sse import DONE, event
from orthrus.server.tokens import TokenBytes
from orthrus.types import Cycle, TokenLogprob


class Shape(Protocol):
    """The format of one answer. `whole` writes a whole answer; a stream calls all other methods, in this order."""

    def begin(self) -> Iterator[bytes]:
        """The events before the first token."""

    def add(self, index: int, cycle: Cycle) -> Iterator[bytes]:
        """The events for a new record of the index-th text."""

    def end(self, index: int) -> Iterator[bytes]:
        """The events for the end of the index-th text."""

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """The events for an error after the status has been sent. No text goes on."""

    def close(self) -> Iterator[bytes]:
        """The last events of the stream, after an error too."""

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""


@dataclass(slots=True)
class About:
    """The texts of an answer, and the fields that all parts of it repeat.

    prefix, key: form the answer's id; the key is the request's id. num_prompts: prompts of a completion request.
    token_ids: send the ids of tokens. provenance: send the origin of each token. has_calls: texts may hold calls of
    functions. receipt: makes the receipt at the end.
    """

    prefix: str
    key: str
    created: int
    model: str
    fingerprint: str | None
    texts: list[TextRecords]
    num_prompts: int
    seed: int
    bytes: TokenBytes
    token_ids: bool
    provenance: bool
    has_calls: bool
    prompts: list[list[int]]
    receipt: Callable[[], dict[str, Any]] | None = None

    @property
    def id(self) -> str:
        return self.prefix + self.key

    @property
    def usage(self) -> dict[str, Any]:
        return usage(self.texts, self.num_prompts)

    @property
    def metrics(self) -> dict[str, Any]:
        found = metrics(self.texts, self.seed)
        if self.receipt is not None:
            found["orthrus"]["receipt"] = self.receipt()
        return found


class OpenAIShape(ABC):
    """The common part of OpenAI's two formats. include_usage: a last chunk holds the usage."""

    whole_kind: str
    chunk_kind: str

    def __init__(self, about: About, *, include_usage: bool) -> None:
        self._about, self._include_usage = about, include_usage
        self._num_left = len(about.texts)

    def begin(self) -> Iterator[bytes]:
        for index in range(len(self._about.texts)):
            choice = self._first(index)
            if choice is not None:
                yield self._event([choice], **(self._prompt_ids() if index == 0 else {}))

    def add(self, index: int, cycle: Cycle) -> Iterator[bytes]:
        about = self._about
        choice = self._next(index, cycle, has_ids=about.token_ids and bool(cycle.token_ids))
        if choice is None:
            return
        if about.token_ids:
            choice["token_ids"] = list(cycle.token_ids)
        if about.provenance:
            choice["orthrus"] = provenance(cycle, about.bytes)
        yield self._event([choice])

    def end(self, index: int) -> Iterator[bytes]:
        self._num_left -= 1
        more = {} if self._num_left or self._include_usage else {"metrics": self._about.metrics}
        yield self._event([self._last(index)], **more)
        if self._num_left == 0 and self._include_usage:
            yield event(self._body(self.chunk_kind, [], usage=self._about.usage, metrics=self._about.metrics))

    def failed(self, error: ApiError) -> Iterator[bytes]:
        yield event(error.body)

    def close(self) -> Iterator[bytes]:
        yield DONE

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, records in enumerate(self._about.texts):
            choice = self._choice(index, records)
            if self._about.token_ids:
                choice["token_ids"] = [i for c in records.cycles for i in c.token_ids]
            choices.append(choice)
        statistics = {"usage": self._about.usage, "metrics": self._about.metrics}
        return self._body(self.whole_kind, choices, **statistics, **self._prompt_ids())

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        if self._include_usage:
            more["usage"] = None
        return event(self._body(self.chunk_kind, choices, **more))

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        about = self._about
        return {
            "id": about.id,
            "object": kind,
            "created": about.created,
            "model": about.model,
            "system_fingerprint": about.fingerprint,
            "choices": choices,
        } | more

    def _prompt_ids(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def _first(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, if there is one."""

    @abstractmethod
    def _next(self, index: int, cycle: Cycle, *, has_ids: bool) -> dict[str, Any] | None:
        """The chunk that a record adds to a choice; None if it adds nothing."""

    @abstractmethod
    def _last(self, index: int) -> dict[str, Any]:
        """The end of a choice."""

    @abstractmethod
    def _choice(self, index: int, records: TextRecords) -> dict[str, Any]:
        """A choice in one piece."""


class ChatShape(OpenAIShape):
    """/v1/chat/completions."""

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, about: About, *, include_usage: bool) -> None:
        super().__init__(about, include_usage=include_usage)
        self._readers = [CallReader() for _ in about.texts] if about.has_calls else []

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._about.prompts[0]} if self._about.token_ids else {}

    def _first(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def _next(self, index: int, cycle: Cycle, *, has_ids: bool) -> dict[str, Any] | None:
        piece = self._readers[index].feed(cycle.text) if self._readers else Piece(cycle.text)
        if not piece and not cycle.logprobs and not has_ids:
            return None
        logprobs = None if cycle.logprobs is None else {"content": self._content(cycle.logprobs)}
        return self._chunk(index, self._delta(index, piece), logprobs, None)

    def _last(self, index: int) -> dict[str, Any]:
        piece = self._readers[index].flush() if self._readers else Piece()
        delta = self._delta(index, piece) if piece else {}
        return self._chunk(index, delta, None, self._finish(index))

    def _choice(self, index: int, records: TextRecords) -> dict[str, Any]:
        found = [c.logprobs for c in records.cycles if c.logprobs is not None]
        message: dict[str, Any] = {"role": "assistant", "content": records.text, "refusal": None}
        if self._readers:
            content, calls = read_calls(self._readers[index], records.text)
            message["content"] = content or (None if calls else "")
            if calls:
                message["tool_calls"] = [self._call(index, each) for each in calls]
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": self._content([lp for some in found for lp in some])} if found else None,
            "finish_reason": self._finish(index),
        }

    def _finish(self, index: int) -> str | None:
        finish = finish_reason(self._about.texts[index].finish)
        has_calls = bool(self._readers) and self._readers[index].num_calls > 0
        return "tool_calls" if finish == "stop" and has_calls else finish

    def _delta(self, index: int, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": piece.content} if piece.content or not piece.calls else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": each.index} | self._call(index, each) for each in piece.calls]
        return delta

    def _call(self, index: int, piece: CallPiece) -> dict[str, Any]:
        if piece.name is None:
            return {"function": {"arguments": piece.arguments}}
        return {
            "id": call_id(self._about, index, piece),
            "type": "function",
            "function": {"name": piece.name, "arguments": piece.arguments},
        }

    @staticmethod
    def _chunk(index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _content(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        return [
            self._entry(lp.token_id, lp.logprob)
            | {"top_logprobs": [self._entry(token_id, value) for token_id, value in lp.top]}
            for lp in logprobs
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._about.bytes
        return {"token": token.text(token_id), "logprob": logprob, "bytes": list(token(token_id))}


class TextShape(OpenAIShape):
    """/v1/completions. echoes: for each choice, the prompt to repeat before its text, or an empty text."""

    whole_kind = chunk_kind = "text_completion"

    def __init__(self, about: About, *, include_usage: bool, echoes: Sequence[str]) -> None:
        super().__init__(about, include_usage=include_usage)
        self._echoes = echoes
        self._offsets = [0] * len(echoes)

    def _first(self, index: int) -> dict[str, Any] | None:
        if not self._echoes[index] and not self._about.token_ids:
            return None
        return self._part(index, self._echoes[index], None, None) | self._of_prompt(index)

    def _next(self, index: int, cycle: Cycle, *, has_ids: bool) -> dict[str, Any] | None:
        if not cycle.text and not cycle.logprobs and not has_ids:
            return None
        logprobs = None if cycle.logprobs is None else self._lists(index, cycle.logprobs)
        return self._part(index, cycle.text, logprobs, None)

    def _last(self, index: int) -> dict[str, Any]:
        return self._part(index, "", None, finish_reason(self._about.texts[index].finish))

    def _choice(self, index: int, records: TextRecords) -> dict[str, Any]:
        found = [c.logprobs for c in records.cycles if c.logprobs is not None]
        logprobs = self._lists(index, [lp for some in found for lp in some]) if found else None
        text = self._echoes[index] + records.text
        return self._part(index, text, logprobs, finish_reason(records.finish)) | self._of_prompt(index)

    def _of_prompt(self, index: int) -> dict[str, Any]:
        return {"prompt_token_ids": self._about.prompts[index]} if self._about.token_ids else {}

    @staticmethod
    def _part(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _lists(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        token_bytes = self._about.bytes
        tokens = [token_bytes.text(lp.token_id) for lp in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        tops: list[dict[str, float]] = []
        for lp in logprobs:
            # Several tokens of half a character have the same text. The most probable one is kept.
            top: dict[str, float] = {}
            for token_id, value in (*lp.top, (lp.token_id, lp.logprob)):
                top.setdefault(token_bytes.text(token_id), value)
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": [lp.logprob for lp in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def call_id(about: About, index: int, piece: CallPiece) -> str:
    """The id of a call, to which its result refers."""
    return f"call_{about.key}_{index}_{piece.index}"


def read_calls(reader: CallReader, text: str) -> tuple[str, list[CallPiece]]:
    """The part of a whole text that is outside of calls, and the calls."""
    first, rest = reader.feed(text), reader.flush()
    for piece in rest.calls:
        first.calls[-1].arguments += piece.arguments
    return first.content + rest.content, first.calls
