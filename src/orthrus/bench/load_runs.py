"""Requests at a level of load, and the check that load changed none of their answers."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from string import ascii_uppercase
from time import perf_counter

from orthrus.bench.load_client import Answer, Ask, LoadClient
from orthrus.errors import UserInputError

OnDone = Callable[[int], None]
"""Called with the number of requests that are done."""


@dataclass(frozen=True, slots=True)
class Level:
    """How much load: so many requests open at a time, or so many arrivals a second at random times."""

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise UserInputError("a level is a concurrency or a rate; give one of them.")
        if self.concurrency is not None and self.concurrency < 1:
            raise UserInputError(f"the concurrency must be at least 1, not {self.concurrency}.")
        if self.rate is not None and not (isfinite(self.rate) and self.rate > 0):
            raise UserInputError(f"the rate must be a number above 0, not {self.rate}.")

    def __str__(self) -> str:
        return f"{self.concurrency} at a time" if self.rate is None else f"{self.rate:g} a second"


@dataclass(frozen=True, slots=True)
class Run:
    """All requests once, at one level, by one arm. seconds: from the first request sent to the last answer."""

    level: Level
    arm: str | None
    repeat: int
    started: float
    answers: tuple[Answer, ...]

    @property
    def seconds(self) -> float:
        return max(answer.ended for answer in self.answers) - self.started


async def run_once(
    client: LoadClient,
    asks: Sequence[Ask],
    level: Level,
    *,
    arm: str | None,
    repeat: int,
    seed: int,
    on_done: OnDone = lambda done: None,
) -> Run:
    """Send all requests, the i-th with seed + i, and wait for their answers."""
    answers: list[Answer | None] = [None] * len(asks)
    num_done = 0
    started = perf_counter()

    async def one(index: int, due: float | None) -> None:
        nonlocal num_done
        answers[index] = await client.answer(asks[index], seed + index, arm, due)
        num_done += 1
        on_done(num_done)

    async def loop(left: Iterator[int]) -> None:
        for index in left:
            await one(index, None)

    # The first error that nobody foresaw ends all others.
    async with asyncio.TaskGroup() as tasks:
        if level.rate is None:
            left = iter(range(len(asks)))
            for _ in range(min(level.concurrency or 1, len(asks))):
                tasks.create_task(loop(left))
        else:
            for index, offset in enumerate(arrivals(level.rate, len(asks), f"{seed}/{level}/{repeat}")):
                await asyncio.sleep(max(0.0, started + offset - perf_counter()))
                tasks.create_task(one(index, started + offset))
    return Run(level, arm, repeat, started, tuple(answer for answer in answers if answer is not None))


def arrivals(rate: float, number: int, seed: str) -> list[float]:
    """Seconds from the start at which requests arrive: the first at once, then exponential gaps (Poisson)."""
    draw = random.Random(seed)
    times = [0.0]
    while len(times) < number:
        times.append(times[-1] + draw.expovariate(rate))
    return times


def salted(ask: Ask, seed: int, number: int) -> Ask:
    """The same question behind a name of its run: nothing of it is in a cache, save what all chats begin with."""
    # Runs near each other differ in the first letter, so that not even a page that ends within the name is shared.
    name = f"{ascii_uppercase[(seed + number) % len(ascii_uppercase)]}{seed}.{number}"
    messages = [dict(message) for message in ask.messages]
    place = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    messages[place]["content"] = f"{name}: {messages[place]['content']}"
    return replace(ask, messages=messages)


async def check(
    client: LoadClient, runs: Sequence[Run], strategy: str | None, *, greedy: bool, on_done: OnDone
) -> None:
    """Ask everything again, alone and by `strategy`, and note in each answer whether its token ids are the same.

    Requests that are the same are asked once; greedy: whatever their seed.
    """
    alone: dict[str, list[int] | None] = {}
    num_done = 0
    for run in runs:
        for answer in run.answers:
            if answer.status == "ok" and answer.token_ids is not None:
                key = json.dumps([answer.ask.messages, answer.ask.max_tokens, 0 if greedy else answer.seed])
                if key not in alone:
                    again = await client.answer(answer.ask, answer.seed, strategy)
                    alone[key] = None if again.status != "ok" or again.was_cut else again.token_ids
                expected = alone[key]
                if expected is not None:
                    # What the server's clock ended is the beginning of the answer.
                    until = len(answer.token_ids) if answer.was_cut else None
                    answer.is_equal = answer.token_ids == expected[:until]
            num_done += 1
            on_done(num_done)
