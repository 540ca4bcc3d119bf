"""The stream of records: bookkeeping, cancelling, the end of the context, budgets and slots."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tests import engines
from tests.engines import noting
from tests.tiny import VOCAB, tiny_dual, tiny_prompt
from tests.ways import EVERY_DRAFTING_WAY, EVERY_WAY

from orthrus.config import DecodeConfig, Strategy
from orthrus.decoding.tree import DraftTree
from orthrus.engine import work
from orthrus.engine.round import Observer
from orthrus.engine.stream import TokenStream
from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass
from orthrus.model.pool import SlotPool, pages_for

PROMPT = tiny_prompt(9)
DUAL = tiny_dual("llama", disturb=0.1)


def stream(
    strategy: Strategy = "chain",
    floor: bool = True,
    *,
    prompt: list[int] = PROMPT,
    dual: DualView = DUAL,
    context_length: int = 256,
    tokenizer: Any = None,
    chunk: int = 256,
    observers: Iterable[Observer] = (),
    **options: Any,
) -> TokenStream:
    config = DecodeConfig(**{"max_new_tokens": 40, "strategy": strategy, "floor": floor, **options})
    return engines.stream(
        dual,
        prompt,
        config,
        tokenizer=tokenizer,
        context_length=context_length,
        chunk=chunk,
        observers=observers,
    )


FREE = stream("ar").drain().token_ids


class Letters:
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("A") + i) for i in token_ids)


@EVERY_WAY
def test_the_records_sum_to_the_result(strategy: Strategy, floor: bool) -> None:
    running = stream(strategy, floor, tokenizer=Letters())
    records = list(running)
    result = running.result
    assert records == list(result.cycles)
    assert [c.index for c in records] == list(range(len(records)))
    assert [t for c in records for t in c.token_ids] == list(result.token_ids) == list(FREE)
    assert "".join(c.text for c in records) == result.text == Letters().decode(list(FREE))
    assert [c.finish_reason for c in records] == [None] * (len(records) - 1) + ["length"]
    stats = result.stats
    assert stats.num_prompt_tokens == len(PROMPT)
    assert stats.num_tokens == len(FREE)
    assert stats.num_cycles == len(records) - 1
    for name in ("num_passes", "num_drafted", "num_accepted"):
        assert getattr(stats, name) == sum(getattr(c, name) for c in records)
    assert sum(stats.accepted_histogram) == sum(c.num_drafted > 0 for c in records)
    assert sum(n * count for n, count in enumerate(stats.accepted_histogram)) == stats.num_accepted
    assert stats.ttft_ms == records[0].elapsed_ms > 0
    assert stats.decode_ms == pytest.approx(sum(c.elapsed_ms for c in records[1:]))
    assert (stats.num_accepted > 0) == (strategy != "ar")
    assert stats.num_rows == sum(c.num_rows for c in records[1:])
    assert stats.rows_per_pass == stats.num_rows / (stats.num_passes - 1) >= 1


@EVERY_WAY
def test_one_record_per_cycle_and_it_counts_what_ran(strategy: Strategy, floor: bool) -> None:
    ran: list[Pass] = []
    has_blocks = work.fixed_plan(DecodeConfig(strategy=strategy, floor=floor), 8).num_blocks > 0

    for cycle in stream(strategy, floor, chunk=4, observers=[noting(ran.append)]):
        assert cycle.num_passes == len(ran)
        assert cycle.num_rows == sum(p.num_rows for p in ran)
        *first, last = [(p.num_ar_rows, (p.num_rows - p.num_ar_rows) // 8) for p in ran]
        if cycle.kind == "prefill":
            assert [*first, last] == [(4, 0), (4, 0), (1, 0)]
        elif cycle.kind == "ar":
            assert (first, last) == ([], (1, 0))
        else:
            # The draft pass has its one block, and an AR row by its side with floor.
            assert first in ([], [(int(floor), 1)])
            assert last[0] == 1 + cycle.num_drafted
            assert (last[1] > 0) == has_blocks or cycle.finish_reason
        ran.clear()


def test_a_chain_cycle_has_two_passes_and_a_fused_one_only_where_no_block_was_at_hand() -> None:
    def num_passes(**options: Any) -> list[int]:
        return [c.num_passes for c in stream(**options).drain().cycles if c.num_drafted]

    assert set(num_passes(strategy="chain")) == {2}
    for strategy in ("fused", "fused_tree"):
        # A block at every row: after the first draft there is always another at hand.
        first, *others = num_passes(strategy=strategy, block_budget=8)
        assert (first, set(others)) == (2, {1})
        assert {*num_passes(strategy=strategy, block_budget=1)} == {1, 2}


@EVERY_DRAFTING_WAY
def test_is_draft_marks_the_tokens_that_the_diffusion_view_proposed(strategy: Strategy, floor: bool) -> None:
    """A record holds [what the draft pass decided,] accepted drafts, and a token of the AR view's own."""
    records = stream(strategy, floor).drain().cycles
    assert records[0].kind == "prefill"
    assert records[0].is_draft == (False,)
    assert (records[0].num_drafted, records[0].num_passes) == (0, 1)
    for cycle in records[1:]:
        assert len(cycle.is_draft) == len(cycle.token_ids)
        if cycle.kind == "ar":
            assert (cycle.is_draft, cycle.num_drafted, cycle.num_passes) == ((False,), 0, 1)
            continue
        assert cycle.kind == strategy
        assert cycle.num_accepted == sum(cycle.is_draft) <= cycle.num_drafted
        head = floor and cycle.num_passes == 2
        expected = [False] * head + [True] * cycle.num_accepted + [False]
        cut = len(expected) if cycle.finish_reason is None else len(cycle.token_ids)
        assert list(cycle.is_draft) == expected[:cut]


@EVERY_WAY
def test_the_slots_hold_ar_history_only(strategy: Strategy, floor: bool) -> None:
    running = stream(strategy, floor)
    longest = 0
    for _ in running:
        running.request.slots.check()
        longest = max(longest, running.request.slots.length)
    # All but what the last cycle committed, whose slots are free by now.
    assert longest >= len(PROMPT) + len(FREE) - 1 - 9
    assert running.request.slots.pages == []


@EVERY_WAY
def test_cancelling_between_cycles(strategy: Strategy, floor: bool) -> None:
    running = stream(strategy, floor, tokenizer=Letters())
    first, second = next(running), next(running)
    running.cancel()
    rest = list(running)
    assert [c.finish_reason for c in rest] == ["cancelled"]
    result = running.result
    assert result.finish_reason == "cancelled"
    assert result.token_ids == FREE[: len(result.token_ids)]
    assert result.cycles == (first, second, *rest)
    assert list(running) == []


def test_cancelling_during_a_chunked_prefill_leaves_the_rest_of_the_prompt_unread() -> None:
    ran: list[int] = []

    def note(p: Pass) -> None:
        ran.append(p.num_rows)
        if len(ran) == 3:
            running.cancel()

    running = stream(prompt=tiny_prompt(40), chunk=4, observers=[noting(note)])
    result = running.drain()
    assert ran == [4, 4, 4]
    assert (result.token_ids, result.text, result.finish_reason) == ((), "", "cancelled")
    assert result.stats.num_passes == result.stats.num_prefill_passes == 3


def test_a_result_asked_for_too_early_is_what_there_is() -> None:
    running = stream()
    assert running.result.token_ids == ()
    next(running)
    assert running.result.finish_reason == "cancelled"
    assert running.result.token_ids == FREE[:1]


def test_a_closed_stream_yields_nothing_more() -> None:
    running = stream()
    next(running)
    running.close()
    assert list(running) == []


@EVERY_WAY
@pytest.mark.parametrize("room", range(1, 11))
def test_no_position_reaches_the_end_of_the_context(room: int, strategy: Strategy, floor: bool) -> None:
    """The block is shortened, and every token that fits is still made."""
    context_length, highest = len(PROMPT) + room, 0

    def note(p: Pass, pool: SlotPool, _: torch.Tensor) -> None:
        nonlocal highest
        highest = max(highest, int(p.position_ids_R.max()))
        assert int(p.slots_R.max()) < pool.num_slots

    result = stream(strategy, floor, context_length=context_length, observers=[note]).drain()
    assert result.token_ids == FREE[:room]
    assert result.finish_reason == "length"
    assert highest < context_length


@pytest.mark.parametrize("length", [16, 17])
def test_a_prompt_as_long_as_the_context_is_refused(length: int) -> None:
    with pytest.raises(UserInputError, match=f"the prompt has {length} tokens.* holds 16"):
        stream(prompt=tiny_prompt(length), context_length=16)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UserInputError, match="prompt is empty"):
        stream(prompt=[])


def test_a_block_larger_than_trained_is_refused_with_the_choice() -> None:
    with pytest.raises(UserInputError, match=r"block_size 9 is larger than the 8 .* 2 to 8"):
        stream(block_size=9)


def test_a_block_of_one_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserInputError, match=r"at least 2 .* strategy='ar'"):
        DecodeConfig(block_size=1)


def test_prefill_projects_only_its_last_row() -> None:
    rows: list[int] = []
    hook = DUAL.base.get_output_embeddings().register_forward_hook(
        lambda _m, args, _out: rows.append(len(args[0]))
    )
    try:
        stream(prompt=tiny_prompt(40), chunk=16, max_new_tokens=1).drain()
    finally:
        hook.remove()
    assert rows == [1]


@pytest.mark.parametrize(
    ("options", "head_room"),
    [
        ({"strategy": "ar"}, 0),
        ({"strategy": "chain"}, 8),
        ({"strategy": "tree", "node_budget": 5}, 8),
        ({"strategy": "tree", "node_budget": 30}, 30),
        ({"strategy": "fused"}, 7 + 3 * 8),
        ({"strategy": "fused", "block_budget": 8}, 7 + 8 * 8),
        ({"strategy": "fused_tree", "node_budget": 1, "block_budget": 8}, 1 + 2 * 8),
    ],
)
def test_a_request_takes_pages_for_its_text_and_the_largest_pass_as_it_needs_them(
    options: Any, head_room: int
) -> None:
    most, highest = 0, 0

    def note(p: Pass) -> None:
        nonlocal most, highest
        (span,) = p.spans
        needed = span.length + span.part.num_rows
        assert len(span.pages) == pages_for(needed)
        most = max(most, len(running.request.slots.pages))
        highest = max(highest, needed)

    running = stream(**options, observers=[noting(note)])
    assert running.drain().token_ids == FREE
    assert highest <= len(PROMPT) + 40 + head_room
    assert most == pages_for(highest)


@pytest.mark.parametrize("strategy", ["ar", "chain", "fused_tree"])
def test_what_was_asked_for_takes_no_page_before_it_is_there(strategy: Strategy) -> None:
    running = stream(strategy, max_new_tokens=8000, context_length=10_000)
    next(running)
    assert len(running.request.slots.pages) <= 2
    assert running.request.stop.max_new_tokens == 8000


@pytest.mark.parametrize("length", [7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("strategy", ["chain", "fused_tree"])
def test_a_prompt_in_chunks_reads_what_is_there(strategy: Strategy, length: int) -> None:
    prompt, chunks = tiny_prompt(length), []
    at_once = stream(strategy, prompt=prompt).drain()

    def note(p: Pass) -> None:
        (span,) = p.spans
        chunks.append((p.num_rows, span.length))

    chunked = stream(strategy, prompt=prompt, chunk=8, observers=[noting(note)]).drain()
    assert chunked.token_ids == at_once.token_ids
    assert chunked.stats.num_accepted == at_once.stats.num_accepted > 0
    starts = range(0, length, 8)
    assert chunks[: len(starts)] == [(min(8, length - start), start) for start in starts]
    assert chunked.stats.num_prefill_passes == len(starts)


@EVERY_WAY
@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 2},
        {"block_size": 3, "chunk": 1},
        {"node_budget": 1, "block_budget": 1},
        {"node_budget": 3, "block_budget": 8},
        {"node_budget": 60, "block_budget": 2},
    ],
    ids=str,
)
def test_no_budget_changes_the_text(options: Any, strategy: Strategy, floor: bool) -> None:
    running = stream(strategy, floor, **options)
    result = running.drain()
    assert result.token_ids == FREE
    assert (result.stats.num_drafted > 0) == (strategy != "ar")
    if "node_budget" in options and strategy in ("tree", "fused_tree"):
        assert max(c.num_drafted for c in result.cycles) == options["node_budget"]


def test_mask_rows_of_a_view_without_mask_token_use_its_own_embedding() -> None:
    dual = tiny_dual("llama", disturb=0.1, mask_token_id=None)
    assert dual.mask_embedding is not None
    plain = stream(dual=dual).drain()
    assert plain.token_ids == FREE
    assert plain.stats.num_accepted > 0
    with torch.no_grad():
        dual.mask_embedding.add_(torch.randn(32, generator=torch.Generator().manual_seed(0)) * 10)
    other = stream(dual=dual).drain()
    assert other.token_ids == FREE
    assert other.stats.num_accepted != plain.stats.num_accepted


@pytest.mark.parametrize("strategy", ["chain", "tree", "fused", "fused_tree"])
def test_accepting_everything_changes_the_text(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the parity tests rely on: were verification broken, they would see it."""

    def last_path(tree: DraftTree, ar_ids: Any) -> list[int]:
        return tree.paths()[-1]

    monkeypatch.setattr(work, "accepted_rows", last_path)
    result = stream(strategy).drain()
    assert result.token_ids != FREE
    assert max(result.token_ids) < VOCAB


def test_the_readers_time_is_not_decoding_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("orthrus.engine.engine.perf_counter", lambda: now[0])
    running = stream("chain")
    for _ in running:
        now[0] += 100.0
    assert running.result.stats.decode_ms == running.result.stats.ttft_ms == 0.0


def test_token_ids_that_the_model_does_not_know_are_refused() -> None:
    with pytest.raises(UserInputError, match=rf"token id {VOCAB}, but the model knows 0 to {VOCAB - 1}"):
        stream(prompt=[3, VOCAB])
