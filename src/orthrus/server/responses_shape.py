"""Answers in the shape of OpenAI's /v1/responses, whole and as events."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from orthrus.server.call_reader import CallPiece
from orthrus.server.errors import ApiError
from orthrus.server.figures import finish_reason
from orthrus.server.item_shape import ItemShape
from orthrus.server.responses import ResponseRequest
from orthrus.server.shapes import About, call_id
from orthrus.server.sse import event


class ResponsesShape(ItemShape):
    """One answer: an item for the text outside of calls, and one for each call. See `Shape`.

    A stream has events for the begin, the growth and the end of each item.
    """

    def __init__(self, about: About, body: ResponseRequest) -> None:
        super().__init__(about)
        self._body = body
        self._items: list[dict[str, Any]] = []
        # The item that is being written.
        self._open: dict[str, Any] | None = None
        self._num_events = 0

    def begin(self) -> Iterator[bytes]:
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress"))

    def _finish(self) -> Iterator[bytes]:
        yield from self._close_items()
        yield self._event(f"response.{self._status}", response=self._response(self._status))

    def failed(self, error: ApiError) -> Iterator[bytes]:
        failure = {"code": error.code or "server_error", "message": error.message}
        yield self._event("error", **failure, param=error.param)
        yield self._event("response.failed", response=self._response("failed") | {"error": failure})

    def whole(self) -> dict[str, Any]:
        # Making the events fills the list of items.
        grown = (self.add(0, cycle) for cycle in self._about.texts[0].cycles)
        for _ in chain(*grown, self._rest(), self._close_items()):
            pass
        return self._response(self._status)

    def _close_items(self) -> Iterator[bytes]:
        """The events that end the last item. An answer without text and calls gets an empty text."""
        if not self._items:
            yield from self._open_text()
        yield from self._close_item(self._status)

    @property
    def _status(self) -> str:
        """The status of the finished answer."""
        return "completed" if finish_reason(self._about.texts[0].finish) == "stop" else "incomplete"

    def _grow_text(self, text: str) -> Iterator[bytes]:
        if self._open is None or self._open["type"] != "message":
            yield from self._close_item("completed")
            yield from self._open_text()
        assert self._open is not None
        self._open["content"][0]["text"] += text
        yield self._event(
            "response.output_text.delta", **self._place, content_index=0, delta=text, logprobs=[]
        )

    def _open_text(self) -> Iterator[bytes]:
        item = {"type": "message", "id": f"msg_{self._about.key}_{len(self._items)}", "role": "assistant"}
        yield from self._open_item(item | {"content": []})
        assert self._open is not None
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._open["content"].append(part)
        yield self._event("response.content_part.added", **self._place, content_index=0, part=part)

    def _grow_call(self, piece: CallPiece) -> Iterator[bytes]:
        if piece.name is not None:
            yield from self._close_item("completed")
            item = {
                "type": "function_call",
                "id": f"fc_{self._about.key}_{len(self._items)}",
                "arguments": "",
            }
            yield from self._open_item(item | {"call_id": call_id(self._about, 0, piece), "name": piece.name})
        assert self._open is not None
        if piece.arguments:
            self._open["arguments"] += piece.arguments
            yield self._event("response.function_call_arguments.delta", **self._place, delta=piece.arguments)

    def _open_item(self, item: dict[str, Any]) -> Iterator[bytes]:
        self._open = item | {"status": "in_progress"}
        self._items.append(self._open)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=self._open)

    def _close_item(self, status: str) -> Iterator[bytes]:
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield self._event(
                "response.output_text.done", **self._place, content_index=0, text=part["text"], logprobs=[]
            )
            yield self._event("response.content_part.done", **self._place, content_index=0, part=part)
        else:
            yield self._event(
                "response.function_call_arguments.done",
                **self._place,
                name=item["name"],
                arguments=item["arguments"],
            )
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)
        self._open = None

    @property
    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._items) - 1}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._num_events += 1
        return event({"type": kind, "sequence_number": self._num_events - 1} | fields, kind)

    def _response(self, status: str) -> dict[str, Any]:
        about, body = self._about, self._body
        wanted = body.text.format if body.text is not None and body.text.format is not None else None
        choice = body.tool_choice or "auto"
        response: dict[str, Any] = {
            "id": about.id,
            "object": "response",
            "created_at": about.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": about.model,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }
        if status in ("completed", "incomplete"):
            usage = about.usage
            response["usage"] = {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            }
            response["metrics"] = about.metrics
        return response
