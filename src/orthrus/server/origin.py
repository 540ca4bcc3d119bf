"""The origin of an answer: facts about its request for the audit and the log of traffic."""

from dataclasses import dataclass

from starlette.requests import Request

from orthrus.server.schemas import ChatRequest, CompletionRequest, Message


@dataclass(frozen=True, slots=True)
class Origin:
    """request_id: as in the log. messages: of a chat that they suffice to repeat; None for other requests.

    With tools, a grammar or values for the chat template, the prompt or the law of its answer is another one.
    """

    request_id: str
    messages: tuple[Message, ...] | None = None

    @classmethod
    def of(cls, request: Request, body: ChatRequest | CompletionRequest) -> "Origin":
        messages = None
        if isinstance(body, ChatRequest):
            more = (body.tools, body.chat_template_kwargs)
            has_grammar = body.response_format is not None and body.response_format.type != "text"
            if not any(more) and not has_grammar:
                messages = tuple(body.messages)
        return cls(request.state.request_id, messages)
