"""Answers in the shape of Anthropic's /v1/messages, whole and as events."""

from collections.abc import Iterator
from typing import Any

from orthrus.base.json_text import parse_json
from orthrus.server.call_reader import CallPiece
from orthrus.server.errors import ApiError, anthropic_body
from orthrus.server.figures import finish_reason
from orthrus.server.item_shape import ItemShape
from orthrus.server.shapes import About, call_id, read_calls
from orthrus.server.sse import event


class MessagesShape(ItemShape):
    """One answer: a block for the text outside of calls, and one for each call. See `Shape`."""

    def __init__(self, about: About) -> None:
        super().__init__(about)
        self._num_blocks = 0
        # The kind of the block that is being written.
        self._open: str | None = None

    def begin(self) -> Iterator[bytes]:
        message = self._message([], None) | {
            "usage": {"input_tokens": self._num_prompt_tokens, "output_tokens": 0}
        }
        yield self._event("message_start", message=message)

    def _finish(self) -> Iterator[bytes]:
        if self._open is None and not self._num_blocks:
            # An empty answer has an empty block here, as it has as a whole.
            yield from self._open_block({"type": "text", "text": ""})
        yield from self._close_block()
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._about.texts[0].stop_string}
        yield self._event("message_delta", delta=delta, usage=self._usage, metrics=self._about.metrics)
        yield self._event("message_stop")

    def failed(self, error: ApiError) -> Iterator[bytes]:
        yield event(anthropic_body(error), "error")

    def whole(self) -> dict[str, Any]:
        text = self._about.texts[0].text
        content, calls = (text, []) if self._reader is None else read_calls(self._reader, text)
        blocks: list[dict[str, Any]] = []
        if content or not calls:
            blocks.append({"type": "text", "text": content})
        for call in calls:
            blocks.append(self._tool_use(call) | {"input": _object(call.arguments)})
        return self._message(blocks, self._stop_reason) | {
            "stop_sequence": self._about.texts[0].stop_string,
            "usage": self._usage,
            "metrics": self._about.metrics,
        }

    def _grow_text(self, text: str) -> Iterator[bytes]:
        if self._open != "text":
            yield from self._open_block({"type": "text", "text": ""})
        yield self._delta({"type": "text_delta", "text": text})

    def _grow_call(self, piece: CallPiece) -> Iterator[bytes]:
        if piece.name is not None:
            yield from self._open_block(self._tool_use(piece) | {"input": {}})
        if piece.arguments:
            yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})

    def _tool_use(self, piece: CallPiece) -> dict[str, Any]:
        return {"type": "tool_use", "id": call_id(self._about, 0, piece), "name": piece.name}

    def _open_block(self, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self._close_block()
        self._open = block["type"]
        yield self._event("content_block_start", index=self._num_blocks, content_block=block)

    def _close_block(self) -> Iterator[bytes]:
        if self._open is not None:
            yield self._event("content_block_stop", index=self._num_blocks)
            self._open = None
            self._num_blocks += 1

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return self._event("content_block_delta", index=self._num_blocks, delta=delta)

    @staticmethod
    def _event(kind: str, **fields: Any) -> bytes:
        return event({"type": kind} | fields, kind)

    @property
    def _num_prompt_tokens(self) -> int:
        return self._about.texts[0].num_prompt_tokens

    @property
    def _usage(self) -> dict[str, Any]:
        """Token counts. Prompt tokens found in the cache are counted separately."""
        records = self._about.texts[0]
        cached = records.num_cached
        return {
            "input_tokens": records.num_prompt_tokens - cached,
            "output_tokens": records.num_tokens,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
        }

    @property
    def _stop_reason(self) -> str:
        records = self._about.texts[0]
        if finish_reason(records.finish) != "stop":
            return "max_tokens"
        if records.stop_string is not None:
            return "stop_sequence"
        return "tool_use" if self._reader is not None and self._reader.num_calls else "end_turn"

    def _message(self, content: list[dict[str, Any]], stop_reason: str | None) -> dict[str, Any]:
        return {
            "id": self._about.id,
            "type": "message",
            "role": "assistant",
            "model": self._about.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
        }


def _object(arguments: str) -> dict[str, Any]:
    """The arguments as an object; empty if the call was cut short."""
    try:
        found = parse_json(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
