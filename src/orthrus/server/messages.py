"""/v1/messages: converts requests of Anthropic's API to chats."""

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from orthrus.server.converted import call_of, checked_chat, joined_text
from orthrus.server.errors import bad_request
from orthrus.server.schemas import (
    MOST_MESSAGES,
    MOST_STOPS,
    ChatRequest,
    Name,
    NumTokens,
    Objects,
    Open,
    OrthrusOptions,
    RequestBody,
    StopText,
)

_SKIPPED_BLOCKS = ("thinking", "redacted_thinking")


class MessageTurn(Open):
    """A turn of a message request. `content` is a text, or a list of blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | Objects


class MessageToolChoice(Open):
    """Which tools the model may or must call. `name` is the tool's, for type `tool`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(default=None, max_length=64)
    disable_parallel_tool_use: bool = False


class CountTokensRequest(RequestBody):
    """The fields that make up the prompt of a message: all that POST /v1/messages/count_tokens takes."""

    model: Name | None = None
    messages: Annotated[list[MessageTurn], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    system: str | Objects | None = None
    tools: Annotated[Objects, Field(max_length=1024)] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: JsonValue = None


class MessageRequest(CountTokensRequest):
    """POST /v1/messages. Tools without an input_schema are left out: they run on Anthropic's servers."""

    max_tokens: NumTokens
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    stop_sequences: Annotated[list[StopText], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    metadata: dict[str, JsonValue] | None = None
    service_tier: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    orthrus: OrthrusOptions | None = None


def as_chat(body: CountTokensRequest) -> ChatRequest:
    """The chat that a request asks for. Raises ApiError for what cannot be one."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
        places.append("system")
    for index, turn in enumerate(body.messages):
        turns = _turns(turn, f"messages.{index}")
        messages += turns
        places += [f"messages.{index}"] * len(turns)
    found = [(i, tool) for i, tool in enumerate(body.tools or ()) if "input_schema" in tool]
    tools = [_tool(tool, index) for index, tool in found]
    choice = body.tool_choice
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "tools": tools or None,
        "tool_choice": _choice(choice) if tools or (choice and choice.type in ("any", "tool")) else None,
        "parallel_tool_calls": not (choice is not None and choice.disable_parallel_tool_use),
    }
    if isinstance(body, MessageRequest):
        fields |= {
            "max_completion_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": body.stop_sequences,
            "stream": body.stream,
            "seed": body.seed,
            "orthrus": None if body.orthrus is None else body.orthrus.model_dump(),
        }
    return checked_chat(
        fields,
        {"max_completion_tokens": "max_tokens", "stop": "stop_sequences"},
        {"messages": places, "tools": [f"tools.{index}" for index, _ in found]},
    )


def _turns(turn: MessageTurn, place: str) -> list[dict[str, Any]]:
    """The turns of a chat for one turn of a message request. Each tool result becomes a turn of its own."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    texts, calls, results = [], [], []
    for block in turn.content:
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(str(block["text"]))
        elif kind == "tool_use" and turn.role == "assistant":
            function = call_of(block.get("name"), block.get("input", {}), place)
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and turn.role == "user":
            text = _text(block.get("content") or "", place)
            said = f"Error: {text}" if block.get("is_error") else text
            results.append({"role": "tool", "content": said, "tool_call_id": block.get("tool_use_id")})
        elif kind not in _SKIPPED_BLOCKS:
            raise bad_request(
                f"{place}: a block of type {ascii(kind)[:60]} cannot be read.", param="messages"
            )
    text = "".join(texts)
    if calls:
        return [{"role": "assistant", "content": text or None, "tool_calls": calls}]
    return results + ([{"role": turn.role, "content": text}] if text or not results else [])


def _text(content: Any, place: str) -> str:
    return joined_text(content, place, kinds=("text",), part="block")


def _tool(tool: dict[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(tool.get("name"), str) or not isinstance(tool["input_schema"], dict):
        raise bad_request(f"tools.{index}: a tool needs a name and an input_schema.", param="tools")
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    if isinstance(tool.get("description"), str):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _choice(choice: MessageToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type != "tool":
        return {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    if choice.name is None:
        raise bad_request("tool_choice of type tool needs a name.", param="tool_choice")
    return {"type": "function", "function": {"name": choice.name}}
