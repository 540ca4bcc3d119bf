"""Prompts of requests as token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

from orthrus.api import Orthrus
from orthrus.errors import UserInputError
from orthrus.server.errors import ApiError, bad_request
from orthrus.server.schemas import Message, Tool
from orthrus.server.tools import with_tools


def chat_ids(
    orthrus: Orthrus,
    messages: list[Message],
    tools: Sequence[Tool] | None,
    more: Mapping[str, Any] | None,
) -> list[int]:
    """Token ids of a chat. Raises ApiError for messages that the template, or the model, cannot take."""
    try:
        turns, template_tools = with_tools(chat_turns(orthrus, messages), tools, _template(orthrus))
        return orthrus.base.encode_prompt(turns, template_values=more, tools=template_tools)
    except UserInputError as error:
        raise bad_request(str(error), param="messages") from error


def chat_turns(orthrus: Orthrus, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages of a chat without tools, as the model's template takes them."""
    turns = [message.model_dump(exclude_unset=True) for message in messages]
    for turn in turns:
        if turn["role"] == "assistant" and turn.get("tool_calls") is None:
            turn.pop("tool_calls", None)
        elif "content" not in turn:
            turn["content"] = None
    if any(turn["role"] == "developer" for turn in turns) and "developer" not in _template(orthrus):
        turns = _system_first(turns)
    return turns


def _template(orthrus: Orthrus) -> str:
    return str(getattr(orthrus.base.tokenizer, "chat_template", None))


def _system_first(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins developer and system messages into one system message at the beginning.

    A template that does not know the role developer would drop or refuse it.
    """
    said = [turn for turn in turns if turn["role"] in ("developer", "system")]
    parts: list[Any] = []
    for turn in said:
        content = turn.get("content")
        parts += ["\n\n"] if parts else []
        parts += content if isinstance(content, list) else [content or ""]
    rest = [turn for turn in turns if turn["role"] not in ("developer", "system")]
    return [{"role": "system", "content": parts}, *rest]


def text_ids(orthrus: Orthrus, prompt: str | list[int]) -> list[int]:
    """Token ids of a text without chat template, or the ids themselves."""
    if isinstance(prompt, list):
        return prompt
    try:
        return orthrus.base.encode_prompt(prompt, raw=True)
    except UserInputError as error:
        raise bad_request(str(error), param="prompt") from error


def prompts_of(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts that a completion request holds."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def room_behind(prompt_ids: list[int], context_length: int, param: str) -> int:
    """Number of tokens that fit after a prompt. Raises ApiError if there are none."""
    if len(prompt_ids) >= context_length:
        raise ApiError(
            400,
            f"The context holds {context_length} tokens, but the prompt alone has {len(prompt_ids)}: "
            "shorten it.",
            param=param,
            code="context_length_exceeded",
        )
    return context_length - len(prompt_ids)
