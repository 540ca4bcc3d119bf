"""Whom an answer is for: what an audit and a log of traffic say of its request."""

from dataclasses import dataclass

from starlette.requests import Request

from orthrus.server.schemas import ChatRequest, CompletionRequest, Message


@dataclass(frozen=True, slots=True)
class Origin:
    """request_id: as the log has it. messages: of a chat without tools, which its messages alone make again."""

    request_id: str
    messages: tuple[Message, ...] | None = None

    @classmethod
    def of(cls, request: Request, body: ChatRequest | CompletionRequest) -> "Origin":
        messages = None
        if isinstance(body, ChatRequest) and not body.tools:
            messages = tuple(body.messages)
        return cls(request.state.request_id, messages)
