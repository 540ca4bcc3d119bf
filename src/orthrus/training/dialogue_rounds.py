"""Hold many dialogues with the base at once: all answers of a round, then all user turns that the model writes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from orthrus.base.loading import Base
from orthrus.config import SamplingParams
from orthrus.decoding.noise import choice_seed
from orthrus.training.answers import Answer, Answerer, Question
from orthrus.training.dialogues import Dialogue, TurnTemplate, answered, turn_template, user_said

_MOST_USER_TOKENS = 120
_USER_TEMPERATURE, _USER_TOP_P = 1.0, 0.95


class Outcome(NamedTuple):
    """A dialogue that is over. finished: its last answer ended by itself. left_out: why there is no answer at all."""

    key: int
    dialogue: Dialogue
    finished: bool
    left_out: str | None

    def record(self) -> dict[str, Any] | None:
        """The line of a corpus; None for a dialogue without an answer to learn from."""
        if self.left_out:
            return {"prompt": self.key, "answer_ids": [], "finished": False, "left_out": self.left_out}
        sample = self.dialogue.sample()
        if sample is None:
            return None
        record = {"prompt": self.key, "answer_ids": list(sample.answer_ids), "finished": self.finished}
        return record | ({"spans": [list(span) for span in sample.spans]} if sample.spans else {})


@dataclass(frozen=True, slots=True)
class Rounds:
    """How dialogues are held.

    max_new_tokens: of an answer. most_tokens: a dialogue this long gets no further turn. refused: user turns
    that no dialogue may hold. Used by one thread at a time, as its answerer is.
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

        sampling: of each dialogue's answers. texts: what each first prompt says, for servers that take only
        texts. on_answer(number of tokens, whether the dialogue is over) is called once for each answer and for
        each user turn that ends a dialogue. Raises UserInputError where there is a second turn and the base's
        chat template takes none.
        """
        several = any(dialogue.given or dialogue.num_own for dialogue in dialogues.values())
        template = turn_template(self.base) if several else TurnTemplate("", "")
        running, finished, spoken = (
            dict(dialogues),
            dict.fromkeys(dialogues, False),
            dict.fromkeys(dialogues, 0),
        )
        while running:
            for side, limit in (("answer", self.max_new_tokens), ("user", _MOST_USER_TOKENS)):
                asked = [key for key, dialogue in running.items() if dialogue.side == side]
                questions = [
                    Question(
                        key,
                        running[key].prompt_ids,
                        _sampling(sampling[key], side, spoken[key]),
                        texts[key] if spoken[key] == 0 else None,
                    )
                    for key in asked
                ]
                for answer in self.answerer(questions, max_new_tokens=limit):
                    key = answer.key
                    spoken[key] += 1
                    before = running[key]
                    running[key] = dialogue = self._heard(before, answer, template)
                    if dialogue.spans != before.spans:
                        finished[key] = answer.finished
                    over = dialogue.side is None
                    if side == "answer" or over:
                        on_answer(len(answer.token_ids) if side == "answer" else 0, over)
                    if over:
                        del running[key]
                        nothing = answer.left_out if not dialogue.spans else None
                        yield Outcome(key, dialogue, finished[key], nothing)

    def _heard(self, dialogue: Dialogue, answer: Answer, template: TurnTemplate) -> Dialogue:
        if dialogue.side == "user":
            return user_said(
                dialogue, answer.token_ids, self.base, template,
                finished=answer.finished, most_tokens=self.most_tokens, refused=self.refused,
            )  # fmt: skip
        return answered(
            dialogue, answer.token_ids, self.base, template,
            finished=answer.finished, most_tokens=self.most_tokens,
        )  # fmt: skip


def _sampling(of_answers: SamplingParams, side: str, number: int) -> SamplingParams:
    """For what is said `number`-th in a dialogue: no two draws of a dialogue share their noise."""
    seed = choice_seed(of_answers.seed or 0, number)
    if side == "user":
        return SamplingParams(temperature=_USER_TEMPERATURE, top_p=_USER_TOP_P, seed=seed)
    if not of_answers.temperature:
        return of_answers
    return SamplingParams(temperature=of_answers.temperature, top_p=of_answers.top_p, seed=seed)
