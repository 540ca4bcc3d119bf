"""Who takes part in which pass: plain Python over pages, with a decoder that writes its own position."""

import random
from collections.abc import Callable
from time import monotonic

import pytest
from tests.engines import engine_for, run_all
from tests.tiny import FAMILY_CONFIGS, tiny_dual, tiny_prompt

from orthrus.config import DecodeConfig
from orthrus.decoding.processors import LogitRules
from orthrus.decoding.stopping import StopRules
from orthrus.decoding.tree import EMPTY_TREE
from orthrus.engine.detokenize import AnswerText
from orthrus.engine.prefix import PrefixStore
from orthrus.engine.request import Request, Work
from orthrus.engine.scheduler import Scheduler
from orthrus.model.passes import causal
from orthrus.model.pool import PAGE, SlotPool, Slots

Pass = list[tuple[Request, Work]]


def scheduler(
    num_pages: int = 64, *, chunk: int = 64, max_running: int = 64, reuse: bool = False
) -> Scheduler:
    pool = SlotPool(FAMILY_CONFIGS["llama"], num_pages)
    return Scheduler(pool, chunk, max_running, PrefixStore(pool) if reuse else None)


def ask(to: Scheduler, num_prompt: int, num_new: int = 8, *, priority: int = 0, first: int = 0) -> Request:
    """A request in line; `first` tells its prompt from others."""
    config = DecodeConfig(max_new_tokens=num_new, strategy="ar", priority=priority)
    request = Request(
        prompt_ids=[first, *range(1, num_prompt)],
        config=config,
        stop=StopRules(frozenset(), num_new),
        rules=LogitRules(config.sampling, 61, "cpu"),
        text=AnswerText(None, ()),
        slots=Slots(to.pool),
        seed=0,
        block_size=8,
        context_length=10**6,
    )
    to.add(request)
    return request


def one_row(request: Request) -> Work:
    return Work("ar", causal([request.anchor_id]), EMPTY_TREE)


def rows_of(num: int) -> Callable[[Request], Work]:
    """A decoder that verifies drafts: so many rows a pass, of which the first stands."""
    return lambda request: Work("chain", causal([request.anchor_id] * num), EMPTY_TREE)


def run(it: Scheduler, wanted: Callable[[Request], Work] = one_row) -> Pass:
    """One pass, and what becomes of it: a token where a row is judged, the end where all are there."""
    before = list(it.running)
    chosen = it.next_pass(wanted, one_row)
    for request, work in chosen:
        assert request.slots.num_slots >= request.slots.length + work.part.num_rows
        request.slots.commit(work.part.num_rows if work.kind == "prefill" else 1)
        if len(work.part.judged):
            # What a text says is a function of its place.
            request.token_ids.append(request.num_known)
        it.keep(request)
        if len(request.token_ids) == request.config.max_new_tokens:
            request.finish = "length"
    for request in dict.fromkeys([*before, *it.running]):
        if request.finish is not None:
            it.finish(request)
    used = {page for request in it.running for page in request.slots.pages}
    idle = 0 if it.prefixes is None else it.prefixes.num_idle
    assert it.pool.num_free + idle + len(used) == it.pool.num_pages
    assert all(request.slots.pages == [] for request in it.waiting)
    return chosen


def run_out(it: Scheduler, wanted: Callable[[Request], Work] = one_row) -> list[Pass]:
    passes = []
    while it.running or it.waiting:
        passes.append(run(it, wanted))
        assert len(passes) < 5000, "no end"
    return passes


def prompt_rows(chosen: Pass) -> int:
    return sum(work.part.num_rows for _, work in chosen if work.kind == "prefill")


def test_first_come_first_served() -> None:
    it = scheduler(max_running=1)
    requests = [ask(it, 20) for _ in range(4)]
    order = list(dict.fromkeys(id(request) for chosen in run_out(it) for request, _ in chosen))
    assert order == [id(request) for request in requests]
    assert [request.token_ids for request in requests] == [list(range(20, 28))] * 4


def test_a_lower_priority_number_goes_first_and_equal_ones_keep_their_order() -> None:
    it = scheduler(max_running=1)
    low = [ask(it, 4, 2, priority=1) for _ in range(2)]
    high = [ask(it, 4, 2, priority=0) for _ in range(2)]
    urgent = ask(it, 4, 2, priority=-3)
    order = list(dict.fromkeys(id(request) for chosen in run_out(it) for request, _ in chosen))
    assert order == [id(request) for request in (urgent, *high, *low)]


def test_no_more_run_than_may() -> None:
    it = scheduler(max_running=3)
    for _ in range(10):
        ask(it, 5)
    while it.running or it.waiting:
        run(it)
        assert len(it.running) <= 3


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_at_most_a_chunk_of_prompt_rows_a_pass(chunk: int) -> None:
    it = scheduler(chunk=chunk)
    requests = [ask(it, num, 5) for num in (3, 150, 64, 1, 99, 200)]
    passes = run_out(it)
    assert max(map(prompt_rows, passes)) <= chunk
    # And no pass goes by without one while a prompt waits for its turn.
    total = sum(len(request.prompt_ids) for request in requests)
    busy = sum(prompt_rows(chosen) > 0 for chosen in passes)
    assert total / chunk <= busy <= total / chunk + 2 * len(requests) + 1


@pytest.mark.parametrize("chunk", [7, 64, 100])
def test_chunks_end_at_fixed_places_of_a_text(chunk: int) -> None:
    it = scheduler(chunk=chunk)
    requests = [ask(it, num, 5) for num in (30, 150, 64, 1, 99, 200)]
    ends: dict[int, list[int]] = {id(request): [] for request in requests}
    lengths = dict.fromkeys(ends, 0)
    for chosen in run_out(it):
        for request, work in chosen:
            if work.kind == "prefill":
                lengths[id(request)] += work.part.num_rows
                ends[id(request)].append(lengths[id(request)])
    for request in requests:
        num = len(request.prompt_ids)
        assert ends[id(request)] == [*range(chunk, num, chunk), num]


def test_running_requests_decode_in_every_pass_whatever_arrives() -> None:
    """A prompt of 6,000 tokens among eight delays none of their tokens by more than a chunk."""
    it = scheduler(num_pages=200, chunk=256)
    eight = [ask(it, 20, 60) for _ in range(8)]
    for _ in range(3):
        run(it)
    assert all(request.token_ids for request in eight)
    late = ask(it, 6000, 4)
    while not late.token_ids:
        before = [len(request.token_ids) for request in eight]
        chosen = run(it)
        assert [len(request.token_ids) for request in eight] == [n + 1 for n in before]
        assert prompt_rows(chosen) <= 256
        assert sum(work.part.num_rows for _, work in chosen) <= 256 + 8
    assert late.slots.length >= 6000
    # It is not starved either: a chunk in each pass.
    assert len(eight[0].token_ids) <= 3 + 6000 // 256 + 1 + 1


def test_short_prompts_share_a_chunk() -> None:
    it = scheduler(chunk=64)
    for _ in range(5):
        ask(it, 12)
    assert len(run(it)) == 5


def test_preempted_requests_keep_their_tokens_and_all_come_to_their_end() -> None:
    it = scheduler(num_pages=6, chunk=64)
    requests = [ask(it, 60, 100, first=i) for i in range(4)]
    known: dict[int, list[int]] = {}
    while it.running or it.waiting:
        run(it)
        for request in requests:
            before = known.get(id(request), [])
            assert request.token_ids[: len(before)] == before, "a token was lost"
            known[id(request)] = list(request.token_ids)
    assert sum(request.num_preempted for request in requests) > 0
    assert [request.finish for request in requests] == ["length"] * 4
    assert [request.token_ids for request in requests] == [list(range(60, 160))] * 4


def test_the_last_that_came_is_sent_back_first_and_comes_back_first() -> None:
    it = scheduler(num_pages=4, chunk=128)
    first, second = ask(it, 60, 120), ask(it, 60, 120)
    waiting = ask(it, 60, 5)
    while not second.num_preempted:
        run(it)
    assert first in it.running
    assert list(it.waiting) == [second, waiting]
    assert first.num_preempted == 0
    assert second.token_ids
    run_out(it)
    assert first.num_preempted == 0


def test_by_priority_it_is_the_least_urgent_that_is_sent_back() -> None:
    it = scheduler(num_pages=4, chunk=128)
    relaxed = ask(it, 60, 120, priority=5)
    run(it)
    urgent = ask(it, 60, 120, priority=0)
    run_out(it)
    assert relaxed.num_preempted > 0
    assert urgent.num_preempted == 0
    assert relaxed.token_ids == urgent.token_ids


@pytest.mark.parametrize("seed", range(40))
def test_who_is_sent_back_while_a_pass_is_made_up_takes_no_part_in_it(seed: int) -> None:
    """A relaxed request may have been chosen already when an urgent one needs its pages."""
    generator = random.Random(seed)
    it = scheduler(num_pages=5, chunk=generator.choice([7, 64]), reuse=seed % 2 == 0)
    asked = []
    for i in range(12):
        num_prompt = generator.choice([5, 58, 120, 180])
        asked.append(
            ask(it, num_prompt, generator.randint(1, 40), priority=generator.randint(-1, 2), first=i)
        )
        for _ in range(generator.randrange(4)):
            chosen = run(it)
            assert len({id(request) for request, _ in chosen}) == len(chosen)
    run_out(it)
    assert all(len(request.token_ids) == request.config.max_new_tokens for request in asked)


def test_a_request_sent_back_waits_behind_more_urgent_ones() -> None:
    it = scheduler(num_pages=4, chunk=128)
    first = ask(it, 60, 120, priority=-1)
    relaxed = ask(it, 60, 120, priority=1)
    run(it)
    urgent = ask(it, 130, 5, priority=0)
    while not relaxed.num_preempted:
        run(it)
    assert first in it.running
    assert list(it.waiting) in ([urgent, relaxed], [relaxed])
    run_out(it)


def test_what_a_preempted_request_feeds_again_decides_no_token_twice() -> None:
    it = scheduler(num_pages=4, chunk=16)
    requests = [ask(it, 60, 120), ask(it, 60, 120)]
    while it.running or it.waiting:
        for request, work in run(it):
            if work.kind == "prefill" and request.num_preempted and len(request.token_ids) > 1:
                assert len(work.part.judged) == 0
    assert requests[1].num_preempted > 0


@pytest.mark.parametrize("num_prompt", [100, 300])
def test_a_request_alone_larger_than_the_pool_ends_with_length(num_prompt: int) -> None:
    """In its prompt, or in its answer; others before and behind it are answered."""
    it = scheduler(num_pages=4, chunk=64)
    before, large, behind = ask(it, 30, 20), ask(it, num_prompt, 1000), ask(it, 30, 20)
    run_out(it)
    assert large.finish == "length"
    assert (len(large.token_ids) > 0) == (num_prompt < 4 * PAGE)
    for other in (before, behind):
        assert other.token_ids == list(range(30, 50))


def test_rows_of_drafts_need_slots_too() -> None:
    it = scheduler(num_pages=4, chunk=64)
    requests = [ask(it, 60, 60, first=i) for i in range(3)]
    run_out(it, rows_of(30))
    assert [request.token_ids for request in requests] == [list(range(60, 120))] * 3
    assert sum(request.num_preempted for request in requests) > 0


def test_kept_pages_go_before_requests_do() -> None:
    it = scheduler(num_pages=6, chunk=128, reuse=True)
    done = ask(it, 200, 5, first=1)
    run_out(it)
    assert done.finish == "length"
    assert it.prefixes is not None
    assert len(it.prefixes) == 3
    both = [ask(it, 100, 60, first=2), ask(it, 100, 60, first=3)]
    run_out(it)
    assert [request.num_preempted for request in both] == [0, 0]


def test_kept_pages_stay_where_giving_up_all_of_them_would_not_do() -> None:
    it = scheduler(num_pages=8, chunk=512, reuse=True)
    ask(it, 2 * PAGE, 2, first=1)
    run_out(it)
    assert it.prefixes is not None
    assert len(it.prefixes) == 2
    running = ask(it, 4 * PAGE - 20, 10, first=2)
    waiting = ask(it, 6 * PAGE, 8, first=3)
    run(it)
    assert it.running == [running]
    assert list(it.waiting) == [waiting]
    first_text = [1, *range(1, 2 * PAGE), 0]
    assert len(it.prefixes.find(first_text)) == 2


def test_a_preempted_request_finds_its_own_pages_again() -> None:
    it = scheduler(num_pages=5, chunk=64, reuse=True)
    requests = [ask(it, 130, 60, first=i) for i in range(2)]
    run_out(it)
    assert [request.token_ids for request in requests] == [list(range(130, 190))] * 2


def test_finishing_frees_at_once_wherever_a_request_is() -> None:
    it = scheduler(num_pages=8, max_running=1)
    running, waiting = ask(it, 100, 50), ask(it, 10)
    run(it)
    assert (it.running, list(it.waiting)) == ([running], [waiting])
    assert it.pool.num_free == 7
    it.finish(running)
    it.finish(waiting)
    assert it.pool.num_free == 8
    assert (it.running, list(it.waiting)) == ([], [])


def test_a_deadline_ends_a_request_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running, in its prompt, and in line; the others go on."""
    now = [100.0]
    monkeypatch.setattr("orthrus.engine.engine.monotonic", lambda: now[0])
    engine = engine_for(tiny_dual(), chunk=16, max_running=2)
    config = DecodeConfig(max_new_tokens=40, strategy="ar")

    def submit(num: int, deadline: float | None) -> Request:
        return engine.submit(tiny_prompt(num), config, eos_token_ids=frozenset(), deadline=deadline)

    running, free = submit(9, 110.0), submit(9, None)
    for _ in range(5):
        engine.step()
    prompt, queued, late = submit(60, 105.0), submit(9, 105.0), submit(9, 104.0)
    engine.step()
    assert [r.closed for r in (running, free, prompt, queued, late)] == [False] * 5
    now[0] = 107.0
    engine.step()
    assert [r.finish for r in (prompt, queued, late)] == ["deadline"] * 3
    assert all(request.closed and request.slots.pages == [] for request in (prompt, queued, late))
    assert not running.closed
    now[0] = 110.0
    engine.step()
    assert running.finish == "deadline"
    assert 0 < len(running.token_ids) < 40
    assert running.cycles[-1].finish_reason == "deadline"
    run_all(engine, [free])
    assert (free.finish, len(free.token_ids)) == ("length", 40)
    assert free.token_ids[: len(running.token_ids)] == running.token_ids


def test_deadlines_are_of_the_monotonic_clock() -> None:
    engine = engine_for(tiny_dual())
    config = DecodeConfig(max_new_tokens=5, strategy="ar")
    past, future = (
        engine.submit(tiny_prompt(9), config, eos_token_ids=frozenset(), deadline=monotonic() + seconds)
        for seconds in (-1.0, 3600.0)
    )
    run_all(engine, [past, future])
    assert (past.finish, past.token_ids, future.finish) == ("deadline", [], "length")


def test_a_long_prompt_among_eight_running_requests_through_the_engine() -> None:
    """As above, with real passes: rows are counted, and texts compared with each request alone."""
    rows: list[int] = []
    engine = engine_for(tiny_dual(), chunk=16, max_slots=40 * PAGE)
    engine.observers.append(lambda p, pool, hidden: rows.append(p.num_rows))
    config = DecodeConfig(max_new_tokens=40, strategy="ar")
    eight = [engine.submit(tiny_prompt(9, i), config, eos_token_ids=frozenset()) for i in range(8)]
    while not all(request.token_ids for request in eight):
        engine.step()
    late = engine.submit(tiny_prompt(200), config, eos_token_ids=frozenset())
    rows.clear()
    while not late.token_ids:
        before = [len(request.token_ids) for request in eight]
        engine.step()
        assert [len(r.token_ids) for r in eight] == [n + 1 for n in before]
    assert len(rows) == -(-200 // 16)
    assert max(rows) <= 16 + 8
    run_all(engine, [*eight, late])
