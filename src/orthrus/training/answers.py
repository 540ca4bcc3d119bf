"""Answers of the frozen base to many prompts, from the engine here or from elsewhere: for corpora."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from orthrus.config import DecodeConfig, SamplingParams
from orthrus.engine.engine import Engine
from orthrus.engine.request import Request


class Question(NamedTuple):
    """A prompt and how to answer it; `key` comes back with the answer. A sampled one needs a seed of its own.

    texts: the turns that `prompt_ids` hold in the chat template, the user's and the assistant's by turns, for
    servers that take only texts; None where the ids are something else.
    """

    key: int
    prompt_ids: list[int]
    sampling: SamplingParams
    texts: tuple[str, ...] | None = None


class Answer(NamedTuple):
    """New tokens, the end-of-text token included; `finished` is False when the limit cut it off.

    left_out: why there is no answer that a corpus could hold, and then no tokens either.
    """

    key: int
    token_ids: list[int]
    finished: bool
    left_out: str | None = None


class Answerer(Protocol):
    """Where the answers of a corpus come from. Used by one thread at a time."""

    @property
    def origin(self) -> str | None:
        """What a corpus's settings call it; None is the base in this process."""

    def check(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """Make sure, before the first answer that counts, that it is the base that answers.

        questions: greedy ones, the same ones in every run of a corpus. Returns facts for the manifest. Raises
        UserInputError when another model answers.
        """

    def __call__(self, questions: Iterable[Question], *, max_new_tokens: int) -> Iterator[Answer]:
        """Answer all questions; answers come in any order."""


@dataclass(frozen=True, slots=True)
class EngineAnswerer:
    """The base in this process answers, `batch_size` questions at a time."""

    engine: Engine
    batch_size: int
    eos_token_ids: frozenset[int]

    @property
    def origin(self) -> None:
        return None

    def check(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[dict[str, Any]]:
        return []

    def __call__(self, questions: Iterable[Question], *, max_new_tokens: int) -> Iterator[Answer]:
        return answer_all(
            self.engine,
            questions,
            batch_size=self.batch_size,
            max_new_tokens=max_new_tokens,
            eos_token_ids=self.eos_token_ids,
        )


def answer_all(
    engine: Engine,
    questions: Iterable[Question],
    *,
    batch_size: int,
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
) -> Iterator[Answer]:
    """Answer all questions with the AR view, `batch_size` at a time; answers come in the order they end.

    An answer is a function of its question, whatever else is answered beside it; on a CPU with compiled passes
    to the last bit.
    """
    waiting = iter(questions)
    running: list[tuple[int, Request]] = []
    while True:
        while len(running) < batch_size and (question := next(waiting, None)) is not None:
            config = DecodeConfig(max_new_tokens=max_new_tokens, strategy="ar", sampling=question.sampling)
            request = engine.submit(question.prompt_ids, config, eos_token_ids=eos_token_ids)
            running.append((question.key, request))
        if not running:
            return
        engine.step()
        for key, request in running:
            if request.closed:
                yield Answer(key, request.token_ids, request.finish == "stop")
        running = [(key, request) for key, request in running if not request.closed]
