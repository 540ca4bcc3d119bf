"""The origin of an answer: facts about its request for the audit and the log of traffic."""

from dataclasses import dataclass

from starlette.requests import Request

from orthrus.server.schemas import ChatRequest, CompletionRequest, Message


@dataclass(frozen=True, slots=True)
class Origin:
    """request_id: as in the log. messages: of a chat without tools, because only these suffice to repeat it."""

    request_id: str
    messages: tuple[Message, ...] | None = None

    @classmethod
    def of(cls, request: Request, body: ChatRequest | CompletionRequest) -> "Origin":
        messages = None
        if isinstance(body, ChatRequest) and not body.tools:
            messages = tuple(body.messages)
        return cls(request.state.request_id, messages)
