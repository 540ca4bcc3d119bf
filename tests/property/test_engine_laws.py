"""Alone or in company, the same text: random sets of requests through one engine, against each of them alone."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engines import acceptance, check_pages, engine_for
from tests.tiny import tiny_dual, tiny_prompt

from orthrus.config import STRATEGIES, DecodeConfig, SamplingParams
from orthrus.engine.engine import Engine
from orthrus.engine.request import Request
from orthrus.engine.runners import make_runner
from orthrus.model.dual_view import DualView
from orthrus.model.quantise import quantise
from orthrus.model.runner import Runner

pytestmark = pytest.mark.usefixtures("made_up_costs")
EOS = frozenset({2, 17})
laws = settings(max_examples=30, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Ask:
    """A request: when it comes, and after how many of its own records it is cancelled, if it is."""

    prompt: tuple[int, ...]
    config: DecodeConfig
    arrival: int
    cancel_after: int | None


def asked(seed: int, num: int) -> list[Ask]:
    """Prompts of a few tokens to some pages, some of which begin alike; every strategy; every kind of rule.

    Every third set is a crowd: all come at once, each with nearly a page, and soon want a second one.
    """
    generator, is_crowd = random.Random(seed), seed % 3 == 1
    system = tiny_prompt(generator.choice([5, 70, 130]), seed=1000 + seed)
    asks = []
    for i in range(num):
        own = tiny_prompt(
            generator.choice([54, 58, 61] if is_crowd else [1, 3, 9, 40, 70]), seed=seed * 100 + i
        )
        prompt = own if is_crowd or generator.random() < 0.5 else system + own
        sampling = SamplingParams(
            temperature=generator.choice([0.0, 0.0, 0.8, 1.2]),
            top_k=generator.choice([None, 20]),
            top_p=generator.choice([None, 0.9]),
            seed=generator.randrange(1000),
            repetition_penalty=generator.choice([1.0, 1.0, 1.3]),
            frequency_penalty=generator.choice([0.0, 0.4]),
            presence_penalty=generator.choice([0.0, 0.3]),
            logit_bias=generator.choice([None, {7: -100.0, 11: 1.0}]),
        )
        max_new_tokens = generator.randint(1, 30)
        config = DecodeConfig(
            max_new_tokens=max_new_tokens,
            strategy=generator.choice(STRATEGIES),
            floor=generator.random() < 0.8,
            block_size=generator.choice([None, None, 4]),
            node_budget=generator.choice([6, 24]),
            block_budget=generator.choice([1, 3]),
            min_tokens=generator.randint(0, max_new_tokens),
            stop_token_ids=generator.choice([(), (23,)]),
            ignore_eos=generator.random() < 0.3,
            logprobs=generator.choice([None, 0, 3]),
            priority=generator.choice([0, 0, 0, 1, -1]),
            sampling=sampling,
        )
        cancel_after = generator.randint(0, 5) if generator.random() < 0.2 else None
        asks.append(Ask(tuple(prompt), config, 0 if is_crowd else generator.randrange(12), cancel_after))
    return asks


def handed_in(engine: Engine, ask: Ask) -> Request:
    return engine.submit(list(ask.prompt), ask.config, eos_token_ids=EOS)


def in_company(engine: Engine, asks: list[Ask]) -> list[Request]:
    """All of them, each at its time; pages add up after every step."""
    requests: dict[int, Request] = {}
    for step in range(5000):
        for i, ask in enumerate(asks):
            if ask.arrival == step:
                requests[i] = handed_in(engine, ask)
            request = requests.get(i)
            if request is not None and not request.closed and _is_over(ask, request):
                engine.cancel(request)
        if engine.has_work:
            engine.step()
            check_pages(engine)
        elif len(requests) == len(asks):
            break
    else:
        raise AssertionError("the engine does not come to an end")
    return [requests[i] for i in range(len(asks))]


def _is_over(ask: Ask, request: Request) -> bool:
    return ask.cancel_after is not None and len(request.cycles) >= ask.cancel_after


def alone(model: DualView | Runner, ask: Ask, **config: Any) -> Request:
    engine = engine_for(model, **config)
    request = handed_in(engine, ask)
    while not request.closed:
        engine.step()
    return request


def same(found: Request, expected: Request, ask: Ask, *, bits: bool) -> None:
    assert found.failure is None
    logprobs = [p for c in found.cycles for p in c.logprobs or ()]
    wanted = [p for c in expected.cycles for p in c.logprobs or ()]
    if found.finish == "cancelled":
        assert ask.cancel_after is not None
        assert found.token_ids == expected.token_ids[: len(found.token_ids)]
        wanted = wanted[: len(logprobs)]
    else:
        assert found.token_ids == expected.token_ids
        assert found.finish == expected.finish
        # Drafted and accepted tokens. The decisions of auto depend on how many requests run, and so on the company.
        if not found.num_preempted and ask.config.strategy != "auto":
            assert acceptance(found) == acceptance(expected)
    assert [p.token_id for p in logprobs] == [p.token_id for p in wanted]
    if bits:
        assert logprobs == wanted
    else:
        assert [p.logprob for p in logprobs] == pytest.approx([p.logprob for p in wanted], abs=1e-4)
    assert sum(len(c.token_ids) for c in found.cycles) == len(found.token_ids)


def check_company(
    model: DualView | Runner, seed: int, num: int, *, bits: bool, pages: int, **config: Any
) -> list[Request]:
    asks = asked(seed, num)
    engine = engine_for(model, max_slots=pages * 64, **config)
    requests = in_company(engine, asks)
    for request, ask in zip(requests, asks, strict=True):
        same(request, alone(model, ask, chunk=config.get("chunk", 256)), ask, bits=bits)
    scheduler = engine.scheduler
    kept = 0 if scheduler.prefixes is None else len(scheduler.prefixes)
    assert scheduler.pool.num_free + kept == scheduler.pool.num_pages
    return requests


@cache
def dual_of(name: str) -> DualView:
    return tiny_dual(name, disturb=0.1, repair_rank=4 if name == "llama-tied" else None)


@laws
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["llama", "llama-tied", "gemma3"]),
    num=st.integers(1, 8),
    chunk=st.sampled_from([7, 64, 100, 256]),
    pages=st.sampled_from([6, 9, 64]),
    reuse=st.booleans(),
    max_running=st.sampled_from([2, 64]),
)
def test_tokens_log_probs_and_acceptance_are_those_of_the_request_alone(
    seed: int, name: str, num: int, chunk: int, pages: int, reuse: bool, max_running: int
) -> None:
    """Eagerly in float32: passes of other shapes round otherwise, so log probs are close and tokens equal."""
    check_company(
        dual_of(name), seed, num, bits=False, pages=pages, chunk=chunk, reuse=reuse, max_running=max_running
    )


def test_these_sets_meet_preemption_cancellation_reuse_and_drafts_that_stand() -> None:
    """The test above is not empty: every event that it covers happens."""
    found = [
        request
        for seed in range(6)
        for request in check_company(dual_of("llama"), seed, 8, bits=False, pages=5, chunk=64)
    ]
    assert sum(request.num_preempted > 0 for request in found) >= 3
    assert sum(request.finish == "cancelled" for request in found) >= 3
    assert sum(request.num_cached > 0 for request in found) >= 3
    assert {request.finish for request in found} >= {"stop", "length", "cancelled"}
    for strategy in STRATEGIES:
        of_it = [r for r in found if r.config.strategy == strategy]
        assert of_it
        accepted = sum(cycle.num_accepted for r in of_it for cycle in r.cycles)
        assert (accepted > 0) == (strategy != "ar"), strategy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_compiled_requests_are_equal_to_the_last_bit(kind: str) -> None:
    dual = tiny_dual("llama", disturb=0.1, repair_rank=4)
    if kind.startswith("int"):
        quantise(dual, kind)  # type: ignore[arg-type]
    runner = make_runner(dual.to(torch.bfloat16) if kind == "bfloat16" else dual, "compiled")
    found = []
    for seed in range(20):
        chunk, pages = (7, 64, 100, 256)[seed % 4], (6, 9, 64)[seed % 3]
        found += check_company(
            runner, seed, 8, bits=True, pages=pages, chunk=chunk, reuse=seed % 5 > 0, max_running=64
        )
    assert sum(request.num_preempted > 0 for request in found) >= 3
    assert sum(cycle.num_accepted for request in found for cycle in request.cycles) > 100


@pytest.mark.slow
def test_the_order_of_arrival_changes_no_bit_of_a_compiled_answer() -> None:
    runner = make_runner(tiny_dual("llama", disturb=0.1).to(torch.bfloat16), "compiled")
    asks = [ask for ask in asked(3, 8) if ask.cancel_after is None]
    texts: dict[int, set[tuple[int, ...]]] = {i: set() for i in range(len(asks))}
    for order in range(6):
        generator = random.Random(order)
        engine = engine_for(runner, max_slots=9 * 64)
        requests = {}
        for i in generator.sample(range(len(asks)), len(asks)):
            requests[i] = handed_in(engine, asks[i])
            for _ in range(generator.randrange(4)):
                engine.step()
        while engine.has_work:
            engine.step()
        for i, request in requests.items():
            texts[i].add(tuple(request.token_ids))
    assert all(len(found) == 1 for found in texts.values())


def leaky(num: int, seed: int, model: DualView | Runner, each: Callable[[Engine], None]) -> Engine:
    """Tiny requests that come, run, are cancelled, dropped or forgotten at random."""
    generator = random.Random(seed)
    engine = engine_for(model, max_slots=24 * 64, max_running=16)
    alive: list[Request] = []
    done = 0
    while done < num or engine.has_work:
        while done < num and len(alive) < 24:
            config = DecodeConfig(
                max_new_tokens=generator.randint(1, 6),
                strategy=generator.choice(["ar", "chain", "fused_tree"]),
                block_size=4,
                node_budget=4,
            )
            prompt = tiny_prompt(generator.choice([1, 4, 65]), seed=generator.randrange(40))
            alive.append(engine.submit(prompt, config, eos_token_ids=EOS))
            done += 1
        engine.step()
        each(engine)
        for request in alive:
            fate = generator.random()
            if fate < 0.05:
                engine.cancel(request)
            elif fate < 0.08:
                engine.drop(request)
                assert request.slots.pages == []
        alive = [request for request in alive if not request.closed]
    return engine


@pytest.mark.slow
def test_two_thousand_requests_leak_no_page() -> None:
    num_steps = 0

    def each(engine: Engine) -> None:
        nonlocal num_steps
        num_steps += 1
        check_pages(engine)

    engine = leaky(2000, 0, dual_of("llama"), each)
    scheduler = engine.scheduler
    assert scheduler.prefixes is not None
    assert scheduler.pool.num_free + len(scheduler.prefixes) == scheduler.pool.num_pages
    scheduler.prefixes.evict(scheduler.pool.num_pages)
    assert scheduler.pool.num_free == scheduler.pool.num_pages
    assert num_steps > 250


def test_a_few_hundred_requests_leak_no_page() -> None:
    engine = leaky(150, 1, dual_of("llama"), check_pages)
    scheduler = engine.scheduler
    assert scheduler.prefixes is not None
    scheduler.prefixes.evict(scheduler.pool.num_pages)
    assert scheduler.pool.num_free == scheduler.pool.num_pages
    assert max(scheduler.pool.owners(page) for page in range(scheduler.pool.num_pages)) == 0
