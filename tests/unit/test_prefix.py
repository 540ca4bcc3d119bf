"""Kept pages: found by what they hold, given up least recently used first, and never part of the outcome."""

from typing import Any

import pytest
from tests.engines import acceptance, check_pages, engine_for, noting, run_all
from tests.tiny import FAMILY_CONFIGS, tiny_dual, tiny_prompt
from tests.ways import EVERY_DRAFTING_WAY, EVERY_WAY

from orthrus.config import DecodeConfig, SamplingParams, Strategy
from orthrus.engine.engine import Engine
from orthrus.engine.prefix import PrefixPage, PrefixStore
from orthrus.engine.request import Request
from orthrus.model.passes import Pass
from orthrus.model.pool import PAGE, SlotPool, Slots

DUAL = tiny_dual("llama", disturb=0.1)


def text(*numbers: int) -> list[int]:
    """Whole pages, each told by a number."""
    return [number for number in numbers for _ in range(PAGE)]


def store_of(num_pages: int) -> tuple[SlotPool, PrefixStore]:
    pool = SlotPool(FAMILY_CONFIGS["llama"], num_pages)
    return pool, PrefixStore(pool)


def kept(pool: SlotPool, store: PrefixStore, *numbers: int) -> list[PrefixPage]:
    """Pages of a text that a request has fed and then left."""
    nodes: list[PrefixPage] = []
    own = []
    for number in numbers:
        page = pool.take()
        assert page is not None
        own.append(page)
        nodes.append(store.add(nodes[-1] if nodes else None, text(number), page))
    for page in own:
        pool.release(page)
    return nodes


def found(store: PrefixStore, *numbers: int, more: int = 1) -> int:
    return len(store.find([*text(*numbers), *[0] * more]))


def test_the_longest_run_from_the_beginning_is_found() -> None:
    pool, store = store_of(8)
    kept(pool, store, 1, 2, 3)
    assert [found(store, *numbers) for numbers in ((1, 2, 3), (1, 2, 9), (1,), (2, 3), (9,))] == [
        3,
        2,
        1,
        0,
        0,
    ]
    assert found(store, 1, 2, more=40) == 2
    # The last token is never among them: somebody must decide what follows it.
    assert found(store, 1, 2, 3, more=0) == 2
    assert store.find([]) == []
    assert found(store, more=1) == 0


def test_texts_that_begin_alike_share_pages() -> None:
    pool, store = store_of(8)
    first, second = kept(pool, store, 1, 2), kept(pool, store, 1, 3)
    assert first[0] is second[0]
    assert len(store) == 3
    assert pool.num_free == 5
    assert (found(store, 1, 2), found(store, 1, 3)) == (2, 2)


def test_equal_pages_after_other_texts_are_other_pages() -> None:
    pool, store = store_of(8)
    kept(pool, store, 1, 5)
    kept(pool, store, 2, 5)
    assert len(store) == 4
    assert found(store, 5) == 0


def test_the_least_recently_used_go_first_and_ends_before_beginnings() -> None:
    pool, store = store_of(8)
    kept(pool, store, 1, 2)
    kept(pool, store, 3, 4)
    assert found(store, 1, 2) == 2
    assert store.evict(1) == 1
    assert (found(store, 3, 4), found(store, 1, 2)) == (1, 2)
    assert store.evict(1) == 1
    assert (found(store, 3), found(store, 1, 2)) == (0, 2)
    assert store.evict(5) == 2
    assert (len(store), pool.num_free) == (0, 8)


def test_pages_in_use_stay() -> None:
    pool, store = store_of(4)
    nodes = kept(pool, store, 1, 2, 3)
    slots = Slots(pool)
    slots.adopt([node.page for node in nodes[:2]])
    assert store.num_idle == 1
    # Only the third can go: the second is used, and so is the first.
    assert store.evict(3) == 1
    slots.free()
    assert store.num_idle == store.evict(3) == 2


def test_of_two_equal_pages_one_is_kept_and_both_requests_use_it() -> None:
    pool, store = store_of(4)
    (kept_page,) = kept(pool, store, 1)
    slots = Slots(pool)
    assert slots.reserve(PAGE)
    slots.commit(PAGE)
    own = slots.pages[0]
    node = store.add(None, text(1), own)
    slots.replace(0, node.page)
    assert (node, slots.pages) == (kept_page, [kept_page.page])
    assert (pool.owners(own), pool.owners(node.page), store.num_idle) == (0, 2, 0)
    slots.free()
    assert store.num_idle == 1


def test_neighbours_with_one_prompt_leave_no_page_that_cannot_be_given_up() -> None:
    """Both feed the same prompt at once; the one that goes on alone has the whole pool."""
    prompt = tiny_prompt(70, seed=2)
    engine = engine_for(DUAL, context_length=256, max_slots=256)
    first, second = asked(engine, prompt, max_new_tokens=40), asked(engine, prompt, max_new_tokens=186)
    run_all(engine, [first, second])
    alone = engine_for(DUAL, context_length=256, max_slots=256)
    wanted = asked(alone, prompt, max_new_tokens=186)
    run_all(alone, [wanted])
    assert len(wanted.token_ids) == 186
    assert second.token_ids == wanted.token_ids
    assert first.token_ids == wanted.token_ids[:40]


@pytest.mark.parametrize("num_prompt", [100, 250])
@EVERY_DRAFTING_WAY
def test_where_the_pool_ends_no_strategy_changes_the_text(
    strategy: Strategy, floor: bool, num_prompt: int
) -> None:
    """Drafts that the pool cannot hold are left out; the answer goes on as plain decoding would."""
    prompt = tiny_prompt(num_prompt, seed=4)

    def answer(strategy: Strategy, floor: bool) -> Request:
        engine = engine_for(DUAL, context_length=1000, max_slots=256)
        request = asked(engine, prompt, strategy, floor=floor, max_new_tokens=1000)
        run_all(engine, [request])
        return request

    plain, drafted = answer("ar", True), answer(strategy, floor)
    assert len(plain.token_ids) == 257 - num_prompt
    assert (drafted.token_ids, drafted.finish) == (plain.token_ids, "length")
    if num_prompt == 100:
        assert sum(cycle.num_accepted for cycle in drafted.cycles) > 0


def asked(engine: Engine, prompt: list[int], strategy: Strategy = "ar", **options: Any) -> Request:
    config = DecodeConfig(**{"max_new_tokens": 20, "strategy": strategy, **options})
    return engine.submit(prompt, config, eos_token_ids=frozenset())


@EVERY_WAY
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_reuse_never_changes_tokens_or_acceptance(
    strategy: Strategy, floor: bool, temperature: float
) -> None:
    """The same prompt again, a longer one, and one that parts ways in the second page."""
    sampling = SamplingParams(temperature=temperature, seed=3)
    prompt = tiny_prompt(150, seed=1)
    prompts = [prompt, prompt, prompt + tiny_prompt(30, seed=2), prompt[:100] + tiny_prompt(40, seed=3)]
    engine, cached, num_accepted = engine_for(DUAL), [], 0
    for each in prompts:
        request = asked(engine, each, strategy, floor=floor, sampling=sampling)
        run_all(engine, [request])
        cached.append(request.num_cached)
        fresh = engine_for(DUAL, reuse=False)
        alone = asked(fresh, each, strategy, floor=floor, sampling=sampling)
        run_all(fresh, [alone])
        assert alone.num_cached == 0
        assert request.token_ids == alone.token_ids
        assert acceptance(request) == acceptance(alone)
        num_accepted += sum(cycle.num_accepted for cycle in request.cycles)
    assert cached == [0, 128, 128, 64]
    assert (num_accepted > 0) == (strategy != "ar")


def test_what_a_request_finds_of_itself_after_a_preemption_is_not_cached() -> None:
    engine = engine_for(DUAL, max_slots=5 * PAGE, chunk=PAGE, context_length=400)
    requests = [asked(engine, tiny_prompt(20, seed=i), max_new_tokens=180) for i in range(3)]
    run_all(engine, requests)
    assert max(request.num_preempted for request in requests) > 0
    assert [request.num_cached for request in requests] == [0, 0, 0]
    again = asked(engine, tiny_prompt(20, seed=2) + requests[2].token_ids[:60])
    run_all(engine, [again])
    assert again.num_cached == PAGE


def prefill_rows(engine: Engine, prompt: list[int], **options: Any) -> tuple[Request, int]:
    """The request, run to its end, and how many rows its prompt took."""
    request = asked(engine, prompt, **options)
    run_all(engine, [request])
    return request, request.cycles[0].num_rows


def test_the_second_turn_of_a_chat_feeds_only_the_new_part() -> None:
    engine = engine_for(DUAL)
    first, num_rows = prefill_rows(engine, tiny_prompt(90), strategy="fused_tree", max_new_tokens=60)
    assert num_rows == 90
    history = first.prompt_ids + first.token_ids
    turn = [*history, *tiny_prompt(12, seed=5)]
    second, num_rows = prefill_rows(engine, turn, strategy="fused_tree")
    # Whole pages of prompt and answer are there; the last token of the answer was never fed.
    assert second.num_cached == (len(history) - 1) // PAGE * PAGE == 128
    assert num_rows == len(turn) - second.num_cached


def test_where_the_store_is_off_everything_is_fed() -> None:
    engine = engine_for(DUAL, reuse=False)
    for _ in range(2):
        request, num_rows = prefill_rows(engine, tiny_prompt(150))
        assert (request.num_cached, num_rows) == (0, 150)
    assert engine.scheduler.prefixes is None
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


def test_a_shared_system_prompt_is_fed_once_while_its_first_request_still_runs() -> None:
    system, rows = tiny_prompt(140, seed=9), []

    def note(p: Pass) -> None:
        rows.append(p.num_ar_rows)

    engine = engine_for(DUAL, chunk=64, observers=[noting(note)])
    first = asked(engine, [*system, 5], max_new_tokens=60)
    for _ in range(3):
        engine.step()
    others = [asked(engine, [*system, 6 + i], max_new_tokens=9) for i in range(5)]
    run_all(engine, [first, *others])
    assert [request.num_cached for request in others] == [128] * 5
    # 141 rows once, 13 for each of the others, and a row for each further token.
    assert sum(rows) == 141 + 5 * 13 + 59 + 5 * 8
    for request in others:
        alone = engine_for(DUAL, reuse=False)
        expected = asked(alone, request.prompt_ids, max_new_tokens=9)
        run_all(alone, [expected])
        assert request.token_ids == expected.token_ids


def test_running_requests_use_the_very_same_pages() -> None:
    system = tiny_prompt(140, seed=9)
    engine = engine_for(DUAL)
    first = asked(engine, [*system, 5], max_new_tokens=60)
    engine.step()
    second = asked(engine, [*system, 6], max_new_tokens=60)
    engine.step()
    assert first.slots.pages[:2] == second.slots.pages[:2]
    assert first.slots.pages[2] != second.slots.pages[2]
    pool = engine.scheduler.pool
    # Two requests and the store.
    assert [pool.owners(page) for page in first.slots.pages[:3]] == [3, 3, 1]
    run_all(engine, [first, second])


def test_kept_pages_go_when_others_need_them_and_the_oldest_first() -> None:
    engine = engine_for(DUAL, max_slots=8 * PAGE)
    prompts = [tiny_prompt(100, seed=seed) for seed in range(8)]
    for prompt in prompts:
        run_all(engine, [asked(engine, prompt, max_new_tokens=4)])
    assert engine.scheduler.prefixes is not None
    assert len(engine.scheduler.prefixes) <= 8
    newest = asked(engine, prompts[-1], max_new_tokens=4)
    run_all(engine, [newest])
    oldest = asked(engine, prompts[0], max_new_tokens=4)
    run_all(engine, [oldest])
    assert (newest.num_cached, oldest.num_cached) == (64, 0)
    assert newest.num_preempted == oldest.num_preempted == 0


def test_only_committed_pages_are_kept() -> None:
    """Of a request that is dropped in the middle of a cycle nothing undecided is found later."""
    engine = engine_for(DUAL)
    request = asked(engine, tiny_prompt(120, seed=4), "fused_tree", max_new_tokens=100)
    for _ in range(12):
        engine.step()
    known = request.prompt_ids + request.token_ids
    num_fed = request.slots.length
    engine.drop(request)
    check_pages(engine)
    again = asked(engine, [*known, 5], "fused_tree")
    run_all(engine, [again])
    assert again.num_cached == num_fed // PAGE * PAGE
    fresh = engine_for(DUAL, reuse=False)
    expected = asked(fresh, [*known, 5], "fused_tree")
    run_all(fresh, [expected])
    assert again.token_ids == expected.token_ids
    assert acceptance(again) == acceptance(expected)
