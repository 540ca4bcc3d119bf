"""Threads on one model: each gets the text that it would get alone, and stock models live beside them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread
from time import sleep
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tests.engines import check_pages, engine_for, run_all
from tests.tiny import tiny_dual, tiny_prompt
from tests.tiny_orthrus import tiny_orthrus

from orthrus.api import decode_config
from orthrus.config import DecodeConfig
from orthrus.engine.request import Request
from orthrus.engine.stock import stock_generate
from orthrus.engine.stream import TokenStream
from orthrus.errors import UserInputError
from orthrus.model.pool import SlotPool
from orthrus.model.runner import EagerRunner
from orthrus.types import Cycle

PROMPTS = [f"Prompt {i}, of length {'x' * i}" for i in range(8)]
OPTIONS: list[dict[str, Any]] = [
    {"strategy": strategy, "temperature": temperature, "seed": 5, "max_new_tokens": 24, "ignore_eos": True}
    for strategy in ("ar", "chain", "tree", "fused_tree")
    for temperature in (0.0, 1.0)
]


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """Run all in threads that begin together."""
    barrier = Barrier(len(jobs))

    def start(job: Callable[[], Any]) -> Any:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(start, jobs))


def test_threads_get_the_texts_of_one_thread() -> None:
    def results(orthrus: Any, numbers: Iterator[int] | range) -> list[Any]:
        return [orthrus.generate(PROMPTS[i], raw=True, **OPTIONS[i]) for i in numbers]

    expected = results(tiny_orthrus(disturb=0.1), range(8))
    orthrus = tiny_orthrus(disturb=0.1)
    for _ in range(3):
        first, second = at_once(
            lambda: results(orthrus, range(8)), lambda: results(orthrus, range(7, -1, -1))
        )
        for found in (first, second[::-1]):
            assert [r.text for r in found] == [r.text for r in expected]
            assert [r.token_ids for r in found] == [r.token_ids for r in expected]
            assert [r.stats.num_accepted for r in found] == [r.stats.num_accepted for r in expected]
            assert [r.finish_reason for r in found] == ["length"] * 8
    assert sum(r.stats.num_accepted for r in expected) > 0
    check_pages(orthrus.engine)


def test_stock_models_run_beside_requests() -> None:
    orthrus = tiny_orthrus(disturb=0.1)
    prompt, config = tiny_prompt(9), decode_config(strategy="fused_tree", max_new_tokens=40, ignore_eos=True)

    def stock() -> tuple[int, ...]:
        ends: frozenset[int] = frozenset()
        return stock_generate(orthrus.stock(), prompt, max_new_tokens=40, eos_token_ids=ends).token_ids

    expected = stock()

    def ours() -> tuple[int, ...]:
        return orthrus.stream_ids(prompt, config).drain().token_ids

    def forward() -> bool:
        """The live base, which others know as an ordinary model."""
        ids_1T = torch.tensor([prompt])
        with torch.inference_mode():
            return torch.equal(orthrus.dual.base(ids_1T).logits, orthrus.stock()(ids_1T).logits)

    for _ in range(3):
        found = at_once(ours, stock, ours, forward)
        assert found == [expected, expected, expected, True]


@pytest.mark.parametrize("attempt", range(5))
def test_the_first_requests_of_many_threads_share_one_pool(
    attempt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has asked for the pool before: whoever comes first makes it."""
    made: list[SlotPool] = []
    new_pool = EagerRunner.new_pool

    def slow_pool(self: EagerRunner, num_pages: int) -> SlotPool:
        sleep(0.01)
        made.append(new_pool(self, num_pages))
        return made[-1]

    monkeypatch.setattr(EagerRunner, "new_pool", slow_pool)
    engine = engine_for(tiny_dual(), max_slots=20 * 64)
    config = DecodeConfig(max_new_tokens=4, strategy="ar")

    def submit() -> Request:
        return engine.submit(tiny_prompt(9), config, eos_token_ids=frozenset())

    requests = at_once(*[submit] * 8)
    assert len(made) == 1
    assert {id(request.slots.pool) for request in requests} == {id(made[0])}
    run_all(engine, requests)
    assert len({tuple(request.token_ids) for request in requests}) == 1


def test_a_stream_that_is_read_by_one_thread_moves_those_of_others_on() -> None:
    """Records wait for whoever asks later, and none is lost or doubled."""
    dual = tiny_dual(disturb=0.1)
    config = DecodeConfig(max_new_tokens=30, strategy="fused_tree")
    engine = engine_for(dual)
    streams = [
        TokenStream(engine, engine.submit(tiny_prompt(9, seed), config, eos_token_ids=frozenset()))
        for seed in range(4)
    ]
    records = at_once(*[lambda stream=stream: list(stream) for stream in streams])
    for stream, found in zip(streams, records, strict=True):
        assert found == stream.request.cycles
        assert [c.index for c in found] == list(range(len(found)))
        assert sum(len(c.token_ids) for c in found) == 30


def test_cancelling_and_closing_from_other_threads() -> None:
    dual = tiny_dual(disturb=0.1)
    engine = engine_for(dual, max_slots=40 * 64)
    config = DecodeConfig(max_new_tokens=200, strategy="chain")

    def one(seed: int) -> str:
        request = engine.submit(tiny_prompt(9, seed), config, eos_token_ids=frozenset())
        stream = TokenStream(engine, request)
        for number, _ in enumerate(stream):
            if number == seed % 5:
                if seed % 2:
                    stream.cancel()
                else:
                    stream.close()
        return str(request.finish)

    found = at_once(*[lambda seed=seed: one(seed) for seed in range(6)])
    assert found == ["None", "cancelled"] * 3
    check_pages(engine)
    scheduler = engine.scheduler
    assert (scheduler.running, [*scheduler.waiting]) == ([], [])


def test_what_one_thread_asks_wrongly_is_no_matter_to_another() -> None:
    orthrus = tiny_orthrus()

    def wrong() -> str:
        with pytest.raises(UserInputError) as caught:
            orthrus.generate("", raw=True)
        return str(caught.value)

    def right() -> int:
        return len(orthrus.generate("abc", raw=True, strategy="chain", max_new_tokens=9).token_ids)

    text, length, again = at_once(wrong, right, right)
    assert "empty" in text
    assert length == again > 0


def test_an_error_of_a_pass_reaches_all_who_took_part_and_nobody_else() -> None:
    dual = tiny_dual(disturb=0.1)
    engine = engine_for(dual)
    config = DecodeConfig(max_new_tokens=20, strategy="chain")
    streams = [
        TokenStream(engine, engine.submit(tiny_prompt(9, seed), config, eos_token_ids=frozenset()))
        for seed in range(2)
    ]
    next(streams[0])

    def fail(*_: object) -> None:
        raise ValueError("by the way")

    engine.observers.append(fail)
    with pytest.raises(ValueError, match="by the way"):
        streams[0].drain()
    with pytest.raises(ValueError, match="by the way"):
        streams[1].drain()
    engine.observers.clear()
    check_pages(engine)
    later = TokenStream(engine, engine.submit(tiny_prompt(9), config, eos_token_ids=frozenset())).drain()
    assert len(later.token_ids) == 20


def test_a_reader_gets_its_record_while_another_thread_holds_the_engine() -> None:
    """A thread that steps takes the lock again at once, and would keep others out."""
    engine = engine_for(tiny_dual())
    request = engine.submit(tiny_prompt(4), DecodeConfig(max_new_tokens=5), eos_token_ids=frozenset())
    engine.step()
    request.cycles.clear()
    reader = Thread(target=engine.step_for, args=(request,))
    with engine.held():
        reader.start()
        reader.join(0.1)
        assert reader.is_alive()
        request.cycles.append(Mock())
        reader.join(10)
        assert not reader.is_alive()


def test_an_interrupt_in_one_callback_keeps_no_other_request_from_ending() -> None:
    def interrupted(cycle: Cycle) -> None:
        if cycle.finish_reason is not None:
            raise KeyboardInterrupt

    engine = engine_for(tiny_dual())
    config = DecodeConfig(max_new_tokens=5, strategy="ar")
    requests = [
        engine.submit(tiny_prompt(4), config, eos_token_ids=frozenset(), on_cycle=on_cycle)
        for on_cycle in (interrupted, None, interrupted)
    ]
    with pytest.raises(KeyboardInterrupt):
        run_all(engine, requests)
    assert [len(request.token_ids) for request in requests] == [5, 5, 5]
    assert all(request.closed for request in requests)
    assert requests[1].cycles[-1].finish_reason == "length"
