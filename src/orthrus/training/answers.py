"""Answers of the frozen base to many prompts, for corpora: by an engine in this process, or by servers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from orthrus.config import DecodeConfig, SamplingParams
from orthrus.engine.engine import Engine
from orthrus.engine.request import Request


class Question(NamedTuple):
    """A prompt and how to answer it. The answer has the same `key`. Sampling needs a seed of its own.

    texts: the turns in `prompt_ids`, alternately of the user and the assistant, for servers that take only texts. None
    if the ids hold something else.
    """

    key: int
    prompt_ids: list[int]
    sampling: SamplingParams
    texts: tuple[str, ...] | None = None


class Answer(NamedTuple):
    """New tokens, the end-of-text token included. `finished` is False if the limit cut the answer off.

    left_out: the reason why a corpus cannot hold the answer, which then has no tokens.
    """

    key: int
    token_ids: list[int]
    finished: bool
    left_out: str | None = None


class Answerer(Protocol):
    """A source of answers for a corpus. For use by one thread at a time."""

    @property
    def origin(self) -> str | None:
        """Its name in a corpus's settings; None for the base in this process."""

    def check(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """Check, before the first answer that is kept, that the base answers.

        questions: greedy ones, the same in every run of a corpus. Returns facts for the manifest. Raises
        UserInputError if another model answers.
        """

    def __call__(self, questions: Iterable[Question], *, max_new_tokens: int) -> Iterator[Answer]:
        """Answer all questions, in any order."""


@dataclass(frozen=True, slots=True)
class EngineAnswerer:
    """Lets the base in this process answer, `batch_size` questions at a time."""

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
    """Answer all questions with the AR view, `batch_size` at a time. Answers come in the order in which they end.

    An answer depends only on its question, not on other questions. On a CPU with compiled passes this holds to the last
    bit. Raises the error of the first request that fails.
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
            if request.failure is not None:
                raise request.failure
            if request.closed:
                yield Answer(key, request.token_ids, request.finish == "stop")
        running = [(key, request) for key, request in running if not request.closed]
