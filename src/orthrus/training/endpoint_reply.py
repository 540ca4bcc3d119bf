"""Converts questions to requests for OpenAI-compatible servers, and replies to answers. It sends nothing."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeGuard

from orthrus.base.loading import Base
from orthrus.errors import UserInputError
from orthrus.training.answers import Answer, Question
from orthrus.training.dialogues import turn_template

# Further fields of vLLM and SGLang: return ids, and use no sampling settings of the server.
_MORE = {"return_token_ids": True, "repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0}


@dataclass(frozen=True, slots=True)
class Form:
    """A form of request. ids: the prompt is token ids, otherwise chat messages. more: with fields beyond OpenAI's."""

    ids: bool
    more: bool

    @property
    def path(self) -> str:
        return "/completions" if self.ids else "/chat/completions"

    def __str__(self) -> str:
        prompt = "prompts as token ids" if self.ids else "prompts as chat messages"
        return prompt + (", answers as token ids where it gives them" if self.more else ", answers as text")


FORMS = (Form(True, True), Form(True, False), Form(False, True), Form(False, False))
"""From the most exact form to the one that every server takes."""


def request_body(question: Question, form: Form, model: str, max_new_tokens: int) -> dict[str, Any]:
    """The JSON that asks for one answer.

    Raises UserInputError for a prompt that is no user turn, where the server takes only those.
    """
    sampling = question.sampling
    body: dict[str, Any] = {"model": model, "max_tokens": max_new_tokens, "temperature": sampling.temperature}
    if sampling.temperature:
        body |= {"top_p": sampling.top_p, "seed": sampling.seed}
    if form.more:
        body |= _MORE
    if form.ids:
        return body | {"prompt": question.prompt_ids}
    if question.texts is None:
        raise UserInputError(
            "this server takes chat messages only, so it can write no turns of the user; give --prompts or "
            "--dataset, and leave --turns out."
        )
    roles = itertools.cycle(("user", "assistant"))
    return body | {
        "messages": [
            {"role": role, "content": text} for role, text in zip(roles, question.texts, strict=False)
        ]
    }


def prompt_fits(reply: Any, question: Question) -> bool:
    """Whether the server's count of prompt tokens is right. Also true if it gives none."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return not isinstance(counted, int) or counted == len(question.prompt_ids)


@dataclass(frozen=True, slots=True)
class Reader:
    """Converts replies to token ids of the base. end: the id that ends an answer, None if there is none."""

    base: Base
    num_ids: int
    end: int | None

    def answer(self, reply: Any, question: Question, max_new_tokens: int) -> Answer:
        """The answer in a reply. If its tokens are not certain, the answer is empty and gives the reason.

        Raises ValueError for something that is no reply.
        """
        choice = _choice(reply)
        finish = choice.get("finish_reason")
        if finish not in ("stop", "length"):
            return _without(question, f"ended for another reason ({str(finish)[:40]})")
        given = choice.get("token_ids")
        if given is not None:
            if not self._known(given):
                return _without(question, "token ids that the base does not have")
            ids = list(given)
        else:
            text = _text(choice)
            if text is None:
                return _without(question, "reasoning or calls beside the text")
            found = self.ids_of(text)
            if found is None:
                return _without(question, "a text that does not come back from its tokens")
            ids = found
        return self._ended(question, ids, finish == "stop", max_new_tokens)

    def ids_of(self, text: str) -> list[int] | None:
        """The tokens of a text; None if they are not certain, because they decode to another text or end early."""
        tokenizer = self.base.tokenizer
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return ids if back == text and not self.base.eos_token_ids.intersection(ids) else None

    def _ended(self, question: Question, ids: list[int], stopped: bool, max_new_tokens: int) -> Answer:
        """The answer with its end-of-text token, and nothing after that token or beyond the limit."""
        ends = self.base.eos_token_ids
        ended = next((at + 1 for at, token_id in enumerate(ids) if token_id in ends), None)
        if ended is not None:
            ids = ids[:ended]
        elif stopped and self.end is not None:
            ids = [*ids, self.end]
        finished = stopped or ended is not None
        # One token beyond the limit is allowed for an end of text that the server did not count.
        if len(ids) > max_new_tokens + 1:
            ids, finished = ids[:max_new_tokens], False
        if not ids:
            return _without(question, "nothing in it")
        return Answer(question.key, ids, finished)

    def _known(self, ids: Any) -> TypeGuard[list[int]]:
        return isinstance(ids, list) and all(type(i) is int and 0 <= i < self.num_ids for i in ids)


def reader(base: Base) -> Reader:
    """The reader of replies from servers with this base."""
    return Reader(base, len(base.model.get_input_embeddings().weight), _end(base))  # type: ignore[arg-type]


def _end(base: Base) -> int | None:
    """The id that ends an answer. Of several, it is the one that the chat template puts after an answer."""
    ends: Collection[int] = base.eos_token_ids
    if len(ends) == 1:
        return next(iter(ends))
    try:
        after = turn_template(base).to_user
    except UserInputError:
        after = ""
    ids = [i for i in base.tokenizer(after, add_special_tokens=False)["input_ids"] if i in ends]
    own = base.tokenizer.eos_token_id
    return ids[0] if ids else own if own in ends else None


def _choice(reply: Any) -> dict[str, Any]:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("a reply without choices")
    return choices[0]


def _text(choice: dict[str, Any]) -> str | None:
    """The whole text that the model wrote; None if parts of it are in other fields."""
    message = choice.get("message")
    if not isinstance(message, dict):
        text = choice.get("text")
        if not isinstance(text, str):
            raise ValueError("a choice without text")
        return text
    if any(message.get(name) for name in ("reasoning", "reasoning_content", "tool_calls", "refusal")):
        return None
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _without(question: Question, why: str) -> Answer:
    return Answer(question.key, [], False, why)
