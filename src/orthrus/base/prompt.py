"""From a prompt to token ids: the chat template where there is one, plain text where there is none."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orthrus.errors import UserInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[Message],
    *,
    raw: bool = False,
) -> list[int]:
    """Token ids of a prompt, ready for the model to continue.

    Args:
        tokenizer: the base model's own.
        prompt: text, or messages with the keys `role` and `content`. Text becomes one user turn when the
            tokenizer has a chat template.
        raw: take text as it stands, with only what the tokenizer itself adds (a BOS token, say).

    Raises:
        UserInputError: nothing to continue, malformed messages, or messages without a template for them.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserInputError("The prompt is empty: give some text to answer or continue.")
        if raw or tokenizer.chat_template is None:
            ids: list[int] = tokenizer(prompt)["input_ids"]
            return list(ids)
        return _apply_template(tokenizer, [{"role": "user", "content": prompt}])
    if raw:
        raise UserInputError("raw=True takes plain text, not messages: give one string.")
    messages = _checked(prompt)
    if tokenizer.chat_template is None:
        raise UserInputError(
            "This model has no chat template, so it cannot take messages: give one string, or choose an "
            "instruction-tuned model."
        )
    return _apply_template(tokenizer, messages)


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or len(messages) == 0:
        raise UserInputError("The list of messages is empty: give at least one with a role and a content.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserInputError(f"Message {index} is no dictionary: give {{'role': ..., 'content': ...}}.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserInputError(f"Message {index} has no '{key}' text: give both 'role' and 'content'.")
        if not message["role"].strip():
            raise UserInputError(f"Message {index} has an empty role: use 'system', 'user' or 'assistant'.")
    if not messages[-1]["content"].strip():
        raise UserInputError("The last message is empty: give some text to answer.")
    return [dict(message) for message in messages]


def _apply_template(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]]) -> list[int]:
    from jinja2 import TemplateError

    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except TemplateError as error:
        # Templates state their own rules this way, such as "roles must alternate".
        reason = str(error).rstrip(".") or type(error).__name__
        raise UserInputError(f"The model's chat template refuses these messages ({reason}).") from error
    return list(encoded["input_ids"])
