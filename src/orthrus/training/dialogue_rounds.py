"""Holds many dialogues with the base together: all answers of a round, then all user turns that the model writes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from orthrus.base.loading import Base
from orthrus.config import SamplingParams
from orthrus.decoding.noise import choice_seed
from orthrus.training.answers import Answer, Answerer, Question
from orthrus.training.dialogues import Dialogue, TurnTemplate, answered, turn_template, user_said

_MOST_USER_TOKENS = 120
_USER_TEMPERATURE, _USER_TOP_P = 1.0, 0.95


class Outcome(NamedTuple):
    """A dialogue that is over. finished: whether its last answer ended by itself. left_out: why it has no answer."""

    key: int
    dialogue: Dialogue
    finished: bool
    left_out: str | None

    def record(self) -> dict[str, Any] | None:
        """The line of a corpus, or None for a dialogue without an answer to learn from."""
        if self.left_out:
            return {"prompt": self.key, "answer_ids": [], "finished": False, "left_out": self.left_out}
        sample = self.dialogue.sample()
        if sample is None:
            return None
        record = {"prompt": self.key, "answer_ids": list(sample.answer_ids), "finished": self.finished}
        return record | ({"spans": [list(span) for span in sample.spans]} if sample.spans else {})


@dataclass(slots=True)
class _Running:
    """A dialogue that is not over.

    sampling: of its answers. texts: its turns so far, for servers that take chat messages; None if unknown. num_said:
    number of turns that the model wrote.
    """

    key: int
    dialogue: Dialogue
    sampling: SamplingParams
    texts: tuple[str, ...] | None
    num_said: int = 0
    finished: bool = False

    def question(self) -> Question:
        """The next question. No two draws of a dialogue have the same noise. User turns are always sampled."""
        sampling = self.sampling
        seed = choice_seed(self.key if sampling.seed is None else sampling.seed, self.num_said)
        if self.dialogue.side == "user":
            sampling = SamplingParams(temperature=_USER_TEMPERATURE, top_p=_USER_TOP_P, seed=seed)
        elif sampling.temperature:
            sampling = replace(sampling, seed=seed)
        return Question(self.key, self.dialogue.prompt_ids, sampling, self.texts)


@dataclass(frozen=True, slots=True)
class Rounds:
    """Holds dialogues.

    max_new_tokens: limit of an answer. most_tokens: a dialogue of this length gets no further turn. refused: whether a
    user turn is forbidden. For use by one thread at a time, because of its answerer.
    """

    base: Base
    answerer: Answerer
    max_new_tokens: int
    most_tokens: int
    refused: Callable[[str], bool]

    def hold(
        self,
        dialogues: Mapping[int, Dialogue],
        sampling: Mapping[int, SamplingParams],
        texts: Mapping[int, str | None],
        on_answer: Callable[[int, bool], None],
    ) -> Iterator[Outcome]:
        """Yield each dialogue when it is over, in any order.

        sampling: of each dialogue's answers. texts: the text of each first prompt, None if unknown. Servers that take
        only texts can answer only known texts, and cannot write turns of the user. on_answer(number of tokens, whether
        the dialogue is over): called for each answer, and for a user turn that ends a dialogue. Raises UserInputError
        if there is a second turn and the base's chat template takes none.
        """
        several = any(dialogue.given or dialogue.num_own for dialogue in dialogues.values())
        template = turn_template(self.base) if several else TurnTemplate("", "")
        running = {
            key: _Running(key, dialogue, sampling[key], None if (text := texts[key]) is None else (text,))
            for key, dialogue in dialogues.items()
        }
        while running:
            for side, limit in (("answer", self.max_new_tokens), ("user", _MOST_USER_TOKENS)):
                questions = [each.question() for each in running.values() if each.dialogue.side == side]
                for answer in self.answerer(questions, max_new_tokens=limit):
                    each = running[answer.key]
                    self._add(each, answer, template)
                    over = each.dialogue.side is None
                    if side == "answer" or over:
                        on_answer(len(answer.token_ids) if side == "answer" else 0, over)
                    if over:
                        del running[answer.key]
                        nothing = answer.left_out if not each.dialogue.spans else None
                        yield Outcome(answer.key, each.dialogue, each.finished, nothing)

    def _add(self, each: _Running, answer: Answer, template: TurnTemplate) -> None:
        """Add an answer, or a user turn, to its dialogue."""
        before, ids, options = each.dialogue, answer.token_ids, {"most_tokens": self.most_tokens}
        each.num_said += 1
        if before.side == "user":
            each.dialogue = user_said(
                before, ids, self.base, template, finished=answer.finished, refused=self.refused, **options
            )
            return
        each.dialogue = answered(before, ids, self.base, template, finished=answer.finished, **options)
        if each.dialogue.spans != before.spans:
            each.finished = answer.finished
        given = before.given[0].strip() if each.dialogue.side == "answer" else None
        if given is None or each.texts is None:
            each.texts = None
        else:
            text = str(self.base.tokenizer.decode(ids, skip_special_tokens=True))
            each.texts = (*each.texts, text, given)
