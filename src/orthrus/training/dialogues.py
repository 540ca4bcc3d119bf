"""Dialogues of several turns in which the base writes every answer, and on request user turns too.

The functions are pure: they say what to ask next, and add an answer to a dialogue. The caller runs the model on
`prompt_ids` and passes back its tokens. A dialogue is one sequence of token ids, so the base's answer never goes
through the tokenizer again. The next turn, and training, get exactly the ids that it wrote.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orthrus.base.loading import Base
from orthrus.base.prompt import template_text
from orthrus.errors import UserInputError
from orthrus.training.corpus import Sample
from orthrus.training.self_prompts import is_repetitive

Side = Literal["answer", "user"]
_MARKS = ("\u241f", "\u241e", "\u241d")
_MIN_WORDS = 2


@dataclass(frozen=True, slots=True)
class TurnTemplate:
    """The parts of a chat template between the texts of a dialogue, with special tokens, as text.

    to_user: between an answer and the user's next text. to_answer: between that text and the next answer.
    """

    to_user: str
    to_answer: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The state of a dialogue.

    first_ids: the first user turn through the chat template. ids: all later ids. spans: the parts (start, end) of `ids`
    that are answers. given: given user turns that are still to come. num_own: user turns that the model may write after
    those. side: who speaks next, or None if the dialogue is over.
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
        """The ids that the model has to continue, for either side."""
        return [*self.first_ids, *self.ids]

    def sample(self) -> Sample | None:
        """The sample for a corpus: the dialogue up to its last answer."""
        if not self.spans:
            return None
        end = self.spans[-1][1]
        spans = self.spans if len(self.spans) > 1 else ()
        return Sample(self.first_ids, self.ids[:end], self.domain, spans)


def turn_template(base: Base) -> TurnTemplate:
    """The pieces of the base's own chat template.

    Raises UserInputError for a base without one, and for a template that refuses several turns or changes their texts.
    """
    if not getattr(base.tokenizer, "chat_template", None):
        raise UserInputError(
            f"{base.name} has no chat template, so it cannot make dialogues of several turns; give --turns 1."
        )
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    try:
        text = template_text(base.tokenizer, messages, add_generation_prompt=True)
    except UserInputError as e:
        raise UserInputError(
            f"{base.name} cannot make dialogues of several turns: {str(e).removesuffix('.')}; give --turns 1."
        ) from e
    _, answered, rest = text.partition(_MARKS[1])
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
    """A dialogue that begins with a user turn (ids through the chat template) and continues with `more_turns`.

    num_turns: number of its answers. Further given turns are left out, and the model writes missing ones. None: one
    answer for each given turn.
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
    """The dialogue after the base's answer. finished: whether the answer ended by itself.

    A repetitive answer is left out and ends the dialogue. An answer that was cut off is kept and ends the dialogue,
    because no user would continue there. So does an answer that reaches `most_tokens`.
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
        # The model writes a trailing space together with its first word, because tokenizers join them.
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

    It ends if that turn was cut off, is too short, is repetitive or is refused.
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
    """The dialogue after a given user turn. It is encoded in one piece, because a tokenizer may join its parts."""
    ids = (*dialogue.ids, *_encoded(base, f"{to_user}{text.strip()}{template.to_answer}"))
    if len(dialogue.first_ids) + len(ids) >= most_tokens:
        return dialogue
    return replace(dialogue, ids=ids, side="answer")


def _to_user(dialogue: Dialogue, base: Base, template: TurnTemplate) -> str:
    """The template's part after an answer, without the end-of-text token that the answer already has."""
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
