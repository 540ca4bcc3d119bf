"""Dialogues of several turns in which the base writes every answer, and the user's side too where it is asked.

Pure: what to ask next, and what becomes of an answer. Whoever runs the model feeds `prompt_ids` and hands back
what came. A dialogue is one run of token ids, so the base never reads its own answer through the tokenizer
again: what it wrote is what the next turn, and training, sees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orthrus.base.loading import Base
from orthrus.errors import UserInputError
from orthrus.training.corpus import Sample
from orthrus.training.self_prompts import is_repetitive

Side = Literal["answer", "user"]
_MARKS = ("\u241f", "\u241e", "\u241d")
_MIN_WORDS = 2


@dataclass(frozen=True, slots=True)
class TurnTemplate:
    """What a chat template puts between the texts of a dialogue.

    to_user: from the end of an answer to the user's next words; to_answer: from there to where the next answer
    begins. Both are text, special tokens included.
    """

    to_user: str
    to_answer: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A dialogue on its way.

    first_ids: the first user turn through the chat template. ids: all that came after it. spans: which parts
    (start, end) of `ids` the base answered. given: user turns that are still to come. num_own: user turns that
    the model may write itself after those. side: who speaks next, None where the dialogue is over.
    """

    first_ids: tuple[int, ...]
    domain: str
    given: tuple[str, ...] = ()
    num_own: int = 0
    ids: tuple[int, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    side: Side | None = "answer"

    @property
    def prompt_ids(self) -> list[int]:
        """What the model is to go on from, whoever speaks."""
        return [*self.first_ids, *self.ids]

    def sample(self) -> Sample | None:
        """What a corpus keeps of it: up to the last answer, without a question that nobody answered."""
        if not self.spans:
            return None
        end = self.spans[-1][1]
        spans = self.spans if len(self.spans) > 1 else ()
        return Sample(self.first_ids, self.ids[:end], self.domain, spans)


def turn_template(base: Base) -> TurnTemplate:
    """The pieces of the base's own chat template.

    Raises UserInputError for a base without one, and for a template that refuses several turns or changes
    what was said.
    """
    from jinja2 import TemplateError

    if not getattr(base.tokenizer, "chat_template", None):
        raise UserInputError(
            f"{base.name} has no chat template, so it cannot make dialogues of several turns; give --turns 1."
        )
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    try:
        text = base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as e:
        raise UserInputError(
            f"the chat template of {base.name} refuses several turns ({e}); give --turns 1."
        ) from e
    _, answered, rest = str(text).partition(_MARKS[1])
    to_user, asked, to_answer = rest.partition(_MARKS[2])
    if not answered or not asked:
        raise UserInputError(
            f"the chat template of {base.name} does not keep what was said, so it cannot make dialogues of "
            "several turns; give --turns 1."
        )
    return TurnTemplate(to_user, to_answer)


def begin(
    first_ids: Sequence[int], more_turns: Sequence[str], domain: str, *, num_turns: int | None = None
) -> Dialogue:
    """A dialogue that opens with a user turn, given through the chat template, and goes on with `more_turns`.

    num_turns: how many answers it is to have: given turns beyond it are left out, and turns that are missing
    the model writes itself. None: one answer for each given turn.
    """
    number = 1 + len(more_turns) if num_turns is None else num_turns
    return Dialogue(
        first_ids=tuple(first_ids),
        domain=domain,
        given=tuple(more_turns[: number - 1]),
        num_own=max(0, number - 1 - len(more_turns)),
    )


def answered(
    dialogue: Dialogue,
    token_ids: Sequence[int],
    base: Base,
    template: TurnTemplate,
    *,
    finished: bool,
    most_tokens: int,
) -> Dialogue:
    """The dialogue after the base's answer; `finished`: it ended by itself.

    An answer that goes round in circles is left out and ends the dialogue; one that was cut off stays and ends
    it, since no user would have gone on there. So does one after which `most_tokens` are reached.
    """
    assert dialogue.side == "answer"
    if not token_ids or is_repetitive(list(token_ids)):
        return replace(dialogue, side=None)
    start = len(dialogue.ids)
    spoken = replace(
        dialogue,
        ids=(*dialogue.ids, *token_ids),
        spans=(*dialogue.spans, (start, start + len(token_ids))),
        side=None,
    )
    if not finished or len(spoken.prompt_ids) >= most_tokens:
        return spoken
    if spoken.given:
        said = replace(spoken, given=spoken.given[1:])
        return _asked(said, _to_user(said, base, template), spoken.given[0], base, template, most_tokens)
    if spoken.num_own:
        # The model writes a space behind it together with its first word, as tokenizers join them.
        opening = _encoded(base, _to_user(spoken, base, template).rstrip(" "))
        return replace(spoken, ids=(*spoken.ids, *opening), num_own=spoken.num_own - 1, side="user")
    return spoken


def user_said(
    dialogue: Dialogue,
    token_ids: Sequence[int],
    base: Base,
    template: TurnTemplate,
    *,
    finished: bool,
    most_tokens: int,
    refused: Callable[[str], bool] = lambda _: False,
) -> Dialogue:
    """The dialogue after the model wrote the user's next turn itself.

    It ends where that turn was cut off, is hardly a text, goes round in circles or is refused.
    """
    assert dialogue.side == "user"
    words = _without_end(token_ids, base)
    text = str(base.tokenizer.decode(words, skip_special_tokens=True)).strip()
    poor = len(text.split()) < _MIN_WORDS or is_repetitive(words) or refused(text)
    if not finished or poor:
        return replace(dialogue, side=None)
    ids = (*dialogue.ids, *words, *_encoded(base, template.to_answer))
    done = len(dialogue.first_ids) + len(ids) >= most_tokens
    return replace(dialogue, ids=ids, side=None if done else "answer")


def _asked(
    dialogue: Dialogue, to_user: str, text: str, base: Base, template: TurnTemplate, most_tokens: int
) -> Dialogue:
    """After a user turn that was given. Encoded in one piece: a tokenizer may join what meets."""
    ids = (*dialogue.ids, *_encoded(base, f"{to_user}{text.strip()}{template.to_answer}"))
    if len(dialogue.first_ids) + len(ids) >= most_tokens:
        return dialogue
    return replace(dialogue, ids=ids, side="answer")


def _to_user(dialogue: Dialogue, base: Base, template: TurnTemplate) -> str:
    """The template's piece after an answer, less the end-of-text token that the answer brought along."""
    last = dialogue.ids[-1]
    if last not in base.eos_token_ids:
        return template.to_user
    end = str(base.tokenizer.decode([last], skip_special_tokens=False))
    return template.to_user.removeprefix(end)


def _without_end(token_ids: Sequence[int], base: Base) -> list[int]:
    ids = list(token_ids)
    return ids[:-1] if ids and ids[-1] in base.eos_token_ids else ids


def _encoded(base: Base, text: str) -> tuple[int, ...]:
    return tuple(base.tokenizer(text, add_special_tokens=False)["input_ids"])
