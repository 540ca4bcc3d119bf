"""From a prompt to token ids: the chat template where there is one, plain text where there is none."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orthrus.base.quiet import quiet_libraries
from orthrus.errors import UserInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

# As in transformers: a template that trims what it is given loses the blank, and we know that it does.
_CONTINUES = "CONTINUES_HERE "
_TEXT_PARTS = ("text", "input_text", "output_text")


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[Message],
    *,
    raw: bool = False,
    template_values: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a prompt, ready for the model to continue.

    Args:
        tokenizer: the base model's own.
        prompt: text, or messages with the keys `role` and `content`. Text becomes one user turn when the
            tokenizer has a chat template. A content may be a list of text parts, and None beside the
            `tool_calls` of an assistant. A last message of the assistant is continued.
        raw: take text as it stands, with only what the tokenizer itself adds (a BOS token, say).
        template_values: more that the chat template may ask for, such as {"enable_thinking": False}; our own
            values go first.
        tools: functions that the chat template describes to the model, as in OpenAI's interface.

    Raises:
        UserInputError: nothing to continue, malformed messages, messages without a template for them, or a
            template that fails.
    """
    if isinstance(prompt, str):
        check_text(prompt, "The prompt")
        if not prompt.strip():
            raise UserInputError("The prompt is empty or blank: give some text to answer or continue.")
        if raw or tokenizer.chat_template is None:
            return _without_second_start(tokenizer, prompt, _token_ids(tokenizer, prompt))
        return _apply_template(tokenizer, [{"role": "user", "content": prompt}], template_values)
    if raw:
        raise UserInputError("raw=True takes plain text, not messages: give one string.")
    messages = checked_messages(prompt)
    if tokenizer.chat_template is None:
        raise UserInputError(
            "This model has no chat template, so it cannot take messages: give one string, or choose an "
            "instruction-tuned model."
        )
    return _apply_template(tokenizer, messages, template_values, tools)


def check_text(text: str, what: str) -> None:
    """UserInputError for text that cannot be written as UTF-8: halves of characters, bytes of another code."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserInputError(
            f"{what} is not valid text (character {error.start} is half a character or a byte that is not "
            "UTF-8): give it as UTF-8."
        ) from error


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies of chat messages with texts as contents; UserInputError names the first that is malformed."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise UserInputError(f"A prompt is text or a list of messages, not {_kind(messages)}.")
    if not messages:
        raise UserInputError("The list of messages is empty: give at least one with a role and a content.")
    checked = [_checked(message, index) for index, message in enumerate(messages)]
    last = checked[-1]
    if not last["content"].strip() and not last.get("tool_calls"):
        raise UserInputError("The last message is empty: give some text to answer.")
    return checked


def _checked(message: Any, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserInputError(f"Message {index} is no dictionary: give {{'role': ..., 'content': ...}}.")
    missing = [key for key in ("role", "content") if key not in message]
    if missing and not (missing == ["content"] and "tool_calls" in message):
        raise UserInputError(f"Message {index} has no '{missing[0]}' text: give both 'role' and 'content'.")
    role, content = message["role"], message.get("content")
    if not isinstance(role, str):
        raise UserInputError(f"The role of message {index} must be text, not {_kind(role)}.")
    if not role.strip():
        raise UserInputError(f"Message {index} has an empty role: use 'system', 'user' or 'assistant'.")
    if content is None and role == "assistant" and "tool_calls" in message:
        content = ""
    content = content_text(content, index)
    check_text(role, f"The role of message {index}")
    check_text(content, f"The content of message {index}")
    return {**message, "role": role, "content": content}


def content_text(content: Any, index: int) -> str:
    """The content of message `index` as one text. Raises UserInputError for what is neither text nor parts of it."""
    if isinstance(content, list | tuple):
        content = "".join(_part(part, index) for part in content)
    if not isinstance(content, str):
        raise UserInputError(
            f"The content of message {index} must be text or a list of text parts, not {_kind(content)}."
        )
    return content


def _part(part: Any, index: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        shown = f"of type {kind!r}" if isinstance(kind, str) and kind not in _TEXT_PARTS else "without a text"
        raise UserInputError(
            f"Message {index} has a part {shown}: Orthrus models read text only, as in "
            "{'type': 'text', 'text': ...}."
        )
    return text


def _kind(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def template_text(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    template_values: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text that the tokenizer's chat template makes of messages.

    Raises UserInputError for a tokenizer without a template, and as `orthrus.base.template.render`.
    """
    from orthrus.base.template import render

    return render(
        _template(tokenizer),
        {
            **(template_values or {}),
            **tokenizer.special_tokens_map,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        },
    )


def _apply_template(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    more: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    continues = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    if continues:
        last = messages[-1]
        messages = [*messages[:-1], {**last, "content": last["content"] + _CONTINUES}]
    text = template_text(
        tokenizer, messages, add_generation_prompt=not continues, template_values=more, tools=tools
    )
    if continues:
        head, found, tail = text.rpartition(_CONTINUES.strip())
        if not found:
            raise UserInputError(
                "The model's chat template leaves out the last message, so it cannot be continued: end with a "
                "message of the user."
            )
        text = head if tail.startswith(" ") else head.rstrip()
    return _token_ids(tokenizer, text, add_special_tokens=False)


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The template's source; of several named ones the default."""
    try:
        template: Any = tokenizer.get_chat_template()
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise UserInputError(f"The model's chat template cannot be chosen ({reason}).") from error
    if not isinstance(template, str):
        raise UserInputError(f"The model's chat template is {_kind(template)}, not text: fetch it again.")
    return template


def _token_ids(tokenizer: "PreTrainedTokenizerBase", text: str, **options: Any) -> list[int]:
    # transformers would warn of a long text before we refuse it with the model's own limit.
    with quiet_libraries():
        return list(tokenizer(text, **options)["input_ids"])


def _without_second_start(tokenizer: "PreTrainedTokenizerBase", text: str, ids: list[int]) -> list[int]:
    """One BOS token where the text begins with one already, and the tokenizer adds another."""
    start: Any = getattr(tokenizer, "bos_token_id", None)
    name: Any = getattr(tokenizer, "bos_token", None)
    twice = start is not None and ids[:2] == [start, start]
    return ids[1:] if twice and text.startswith(name) and not text.startswith(name + name) else ids
