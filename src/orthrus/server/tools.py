"""Function calling: describes tools to a model, and builds the grammar of its calls.

Calls use the format of Hermes and Qwen models: `<tool_call>`, a JSON object, `</tool_call>`. A grammar enforces
this format and the schema of the arguments for every model, so a call can always be parsed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orthrus.base.json_text import parse_json
from orthrus.base.prompt import content_text
from orthrus.config import Grammar
from orthrus.decoding.grammar import whitespace_setting
from orthrus.errors import UserInputError
from orthrus.server.errors import bad_request
from orthrus.server.schemas import ChatRequest, NamedTool, ResponseFormat, Tool

TAG, END_TAG = "<tool_call>", "</tool_call>"
BEFORE_NAME, BEFORE_ARGUMENTS, AFTER_ARGUMENTS = '\n{"name": ', ', "arguments": ', f"}}\n{END_TAG}"
"""The text around a call's name and arguments. A JSON string cannot hold a line break, so the end is unambiguous."""

_INTRODUCTION = (
    "You can call functions. Each line between the tags describes one of them.\n<tools>\n{tools}\n</tools>\n"
    'To call a function, write its name and its arguments as JSON:\n<tool_call>\n{{"name": NAME, "arguments": '
    "{{...}}}}\n</tool_call>\nYou then read the result between <tool_response> and </tool_response>."
)


@dataclass(frozen=True, slots=True)
class Calling:
    """The calls that a request allows.

    tools: the functions. required: the answer consists of calls only. parallel: it may hold several calls.
    """

    tools: tuple[Tool, ...]
    required: bool
    parallel: bool


def calling(body: ChatRequest) -> Calling | None:
    """The calls that a request allows; None if it allows none. Raises ApiError for fields that disagree."""
    choice = body.tool_choice
    if body.tools is None:
        if choice not in (None, "none"):
            raise bad_request("tool_choice needs tools to choose from.", param="tool_choice")
        return None
    names = [tool.function.name for tool in body.tools]
    if len({*names}) < len(names):
        raise bad_request("tools: two functions have the same name.", param="tools")
    if choice == "none":
        return None
    tools = body.tools
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise bad_request(
                "tool_choice names a function that is not among the tools.", param="tool_choice"
            )
    return Calling(tuple(tools), choice not in (None, "auto"), body.parallel_tool_calls is not False)


def call_grammar(allowed: Calling, otherwise: ResponseFormat | None, *, compact: bool = False) -> Grammar:
    """The grammar of an answer: calls, a text, JSON of the response format, or a text before calls.

    compact: arguments and JSON have no whitespace between their parts. Raises ApiError for a schema that no grammar
    can express.
    """
    rules = []
    for number, tool in enumerate(allowed.tools):
        opening = BEFORE_NAME + json.dumps(tool.function.name) + BEFORE_ARGUMENTS
        schema = {"type": "object", **(tool.function.parameters or {})}
        rules.append(
            f"call{number}: {_quoted(opening)} %json {_schema(schema, compact)} {_quoted(AFTER_ARGUMENTS)}"
        )
    some = " | ".join(f"call{number}" for number in range(len(rules)))
    again = f' ("\\n{TAG}" call)*' if allowed.parallel else ""
    starts = [f'"{TAG}" calls']
    if not allowed.required:
        if otherwise is None or otherwise.type == "text":
            # A text ends with the tag and is followed by a call, or never holds the tag.
            starts = ["before calls", "TEXT"]
            rules.append(f'before[suffix="{TAG}"]: /(?s:.*)/')
            rules.append(f"TEXT: /(?s:.*)/ & ~/(?s:.*){TAG}(?s:.*)/")
        else:
            rules.append(f"json: %json {_schema(_wanted(otherwise), compact)}")
            starts.append("json")
    lines = [f"start: {' | '.join(starts)}", f"calls: call{again}", f"call: {some}", *rules]
    try:
        return Grammar("lark", "\n".join(lines))
    except UserInputError as error:
        raise bad_request(f"tools: {error}", param="tools") from error


def _wanted(form: ResponseFormat) -> dict[str, Any]:
    if form.type == "json_schema" and form.json_schema is not None and form.json_schema.schema_ is not None:
        return dict(form.json_schema.schema_)
    return {"type": "object"}


def _schema(schema: dict[str, Any], compact: bool) -> str:
    try:
        return json.dumps(schema | {"x-guidance": whitespace_setting(compact=compact)})
    except (ValueError, RecursionError) as error:
        raise bad_request(f"tools: a schema cannot be used ({error}).", param="tools") from error


def _quoted(text: str) -> str:
    return json.dumps(text)


def with_tools(
    turns: list[dict[str, Any]], tools: Sequence[Tool] | None, template: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Turns, and tools for the chat template, that describe tools, calls and results.

    A template that supports tools and our format of calls gets them unchanged; for others they become text in the
    turns. Raises ApiError for calls that are malformed, UserInputError for contents that are no text.
    """
    turns = [_with_parsed_calls(turn, index) for index, turn in enumerate(turns)]
    described = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    if TAG in template and "tools" in template:
        return turns, described or None
    as_text: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        said = _said(turn, index)
        if turn["role"] == "tool":
            result = f"<tool_response>\n{said}\n</tool_response>"
            if index and turns[index - 1]["role"] == "tool":
                as_text[-1]["content"] += f"\n{result}"
            else:
                as_text.append({"role": "user", "content": result})
        elif turn.get("tool_calls"):
            calls = "\n".join(_written(call) for call in turn["tool_calls"])
            as_text.append(turn | {"content": f"{said}\n{calls}" if said else calls})
        else:
            as_text.append(turn)
    if described:
        lines = "\n".join(json.dumps(each, ensure_ascii=False) for each in described)
        introduction = _INTRODUCTION.format(tools=lines)
        if as_text[0]["role"] == "system":
            said = _said(as_text[0], 0)
            as_text[0] = as_text[0] | {"content": f"{said}\n\n{introduction}" if said else introduction}
        else:
            as_text.insert(0, {"role": "system", "content": introduction})
    return as_text, None


def call_arguments(arguments: object) -> dict[str, Any] | None:
    """The arguments of a call: an object, or an object written as JSON. None for anything else."""
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except ValueError:
            return None
    return arguments if isinstance(arguments, dict) else None


def _with_parsed_calls(turn: dict[str, Any], index: int) -> dict[str, Any]:
    """The turn with parsed arguments: a request holds them as text, a template needs an object."""
    calls = turn.get("tool_calls")
    if calls is None:
        return turn
    field = f"messages.{index}.tool_calls"
    parsed = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_request(f"{field}: a call needs a function with a name.", param="messages")
        arguments = call_arguments(function.get("arguments", {}))
        if arguments is None:
            raise bad_request(f"{field}: arguments must be a JSON object, as text.", param="messages")
        parsed.append(call | {"function": function | {"arguments": arguments}})
    return turn | {"tool_calls": parsed}


def _written(call: dict[str, Any]) -> str:
    function = call["function"]
    name, arguments = (json.dumps(function[key], ensure_ascii=False) for key in ("name", "arguments"))
    return f"{TAG}{BEFORE_NAME}{name}{BEFORE_ARGUMENTS}{arguments}{AFTER_ARGUMENTS}"


def _said(turn: dict[str, Any], index: int) -> str:
    content = turn.get("content")
    return "" if content is None else content_text(content, index)
