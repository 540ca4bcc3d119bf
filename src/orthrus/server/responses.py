"""/v1/responses: converts requests of OpenAI's newer API to chats.

The server stores no answers, so each request must hold its whole history.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from orthrus.server.converted import call_of, checked_chat, joined_text
from orthrus.server.errors import bad_request
from orthrus.server.schemas import (
    MOST_MESSAGES,
    ChatRequest,
    JsonSchema,
    Name,
    NumTokens,
    Objects,
    Open,
    OrthrusOptions,
    RequestBody,
    ResponseFormat,
)

_SKIPPED_ITEMS = ("reasoning", "web_search_call", "file_search_call")
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text")


class TextFormat(Open):
    """Like `response_format` of a chat, but with the fields of `json_schema` on the same level."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Open):
    format: TextFormat | None = None


class FunctionChoice(Open):
    type: Literal["function"]
    name: str = Field(min_length=1, max_length=64)


class ResponseRequest(RequestBody):
    """POST /v1/responses. Tools of other types than "function" are left out: the server runs none."""

    model: Name | None = None
    input: str | Annotated[Objects, Field(max_length=MOST_MESSAGES)] = ""
    instructions: str | None = None
    max_output_tokens: NumTokens | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stream: bool | None = None
    tools: Annotated[Objects, Field(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    metadata: dict[str, JsonValue] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: JsonValue = None
    include: Annotated[list[str], Field(fail_fast=True)] | None = None
    reasoning: JsonValue = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    orthrus: OrthrusOptions | None = None


def as_chat(body: ResponseRequest) -> ChatRequest:
    """The chat that a request asks for. Raises ApiError for what cannot be one."""
    for name in ("previous_response_id", "conversation"):
        if getattr(body, name) is not None:
            raise bad_request(
                f"{name} is not supported: answers are not stored, so send the whole history as input.",
                param=name,
                code="unsupported_parameter",
            )
    if body.background:
        raise bad_request(
            "background is not supported: answers are not stored.",
            param="background",
            code="unsupported_parameter",
        )
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    if body.instructions is not None:
        messages.append({"role": "developer", "content": body.instructions})
        places.append("instructions")
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
        places.append("input")
    else:
        for index, message in _messages(body.input):
            messages.append(message)
            places.append(f"input.{index}")
    if not messages:
        messages.append({"role": "user", "content": ""})
        places.append("input")
    found = [(i, tool) for i, tool in enumerate(body.tools or ()) if tool.get("type") == "function"]
    tools = [_tool(tool, index) for index, tool in found]
    return checked_chat(
        {
            "model": body.model,
            "messages": messages,
            "max_completion_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "seed": body.seed,
            "stream": body.stream,
            "tools": tools or None,
            "tool_choice": _choice(body.tool_choice, bool(tools)),
            "parallel_tool_calls": body.parallel_tool_calls,
            "response_format": _format(body.text),
            "orthrus": None if body.orthrus is None else body.orthrus.model_dump(),
        },
        {"messages": "input"},
        {"messages": places, "tools": [f"tools.{index}" for index, _ in found]},
    )


def _messages(items: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Turns, each with the index of its first item.

    Successive calls, and the text of an answer before them, belong to one turn of the assistant.
    """
    messages: list[tuple[int, dict[str, Any]]] = []
    for index, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message":
            said = _content(item.get("content"), index)
            messages.append((index, {"role": item.get("role"), "content": said}))
        elif kind == "function_call":
            function = call_of(item.get("name"), item.get("arguments", "{}"), f"input.{index}")
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not messages or messages[-1][1]["role"] != "assistant":
                messages.append((index, {"role": "assistant", "content": None}))
            messages[-1][1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = _content(item.get("output"), index)
            messages.append((index, {"role": "tool", "content": output, "tool_call_id": item.get("call_id")}))
        elif kind == "item_reference":
            # Of a reasoning item nothing would be read anyway.
            if not str(item.get("id")).startswith("rs_"):
                raise bad_request(
                    f"input.{index}: a reference to an item is not supported: answers are not stored, so send the "
                    "whole item (in some clients: store = false).",
                    param="input",
                    code="unsupported_parameter",
                )
        elif kind not in _SKIPPED_ITEMS:
            raise bad_request(
                f"input.{index}: an item of type {ascii(kind)[:60]} cannot be read.", param="input"
            )
    return messages


def _content(content: Any, index: int) -> str:
    return joined_text(content, f"input.{index}", kinds=_TEXT_PARTS, part="part")


def _tool(tool: dict[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(tool.get("name"), str):
        raise bad_request(f"tools.{index}: a function needs a name.", param="tools")
    wanted = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in wanted if name in tool}}


def _choice(choice: str | FunctionChoice | None, has_tools: bool) -> Any:
    if isinstance(choice, FunctionChoice):
        return {"type": "function", "function": {"name": choice.name}}
    # If all tools were left out, there is nothing to choose from.
    return choice if has_tools or choice == "required" else None


def _format(text: TextOptions | None) -> dict[str, Any] | None:
    if text is None or text.format is None or text.format.type == "text":
        return None
    wanted = text.format
    if wanted.type == "json_object":
        return ResponseFormat(type="json_object").model_dump(exclude_none=True)
    schema = JsonSchema.model_validate(
        {"name": wanted.name, "schema": wanted.schema_, "strict": wanted.strict}
    )
    return {"type": "json_schema", "json_schema": schema.model_dump(by_alias=True, exclude_none=True)}
