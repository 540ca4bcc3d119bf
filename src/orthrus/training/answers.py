"""Answers of the frozen base to many prompts, through the engine: for corpora."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from orthrus.config import DecodeConfig, SamplingParams
from orthrus.engine.engine import Engine
from orthrus.engine.request import Request


class Question(NamedTuple):
    """A prompt and how to answer it; `key` comes back with the answer. A sampled one needs a seed of its own."""

    key: int
    prompt_ids: list[int]
    sampling: SamplingParams


class Answer(NamedTuple):
    """New tokens, the end-of-text token included; `finished` is False when the limit cut it off."""

    key: int
    token_ids: list[int]
    finished: bool


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
