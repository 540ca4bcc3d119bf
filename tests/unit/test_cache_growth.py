"""A cache that grows with its text: what it keeps, how far it goes, and that the text does not tell."""

from typing import Any

import pytest
import torch
from tests.tiny import VOCAB, tiny_dual, tiny_prompt
from tests.ways import EVERY_WAY

from orthrus.config import DecodeConfig, SamplingParams, Strategy
from orthrus.engine.probe import watch_caches, watch_passes
from orthrus.engine.stream import TokenStream
from orthrus.errors import UserInputError
from orthrus.model import slot_cache
from orthrus.model.dual_view import DualView
from orthrus.model.passes import ar_step, draft_block, prefill, verify_chain
from orthrus.model.slot_cache import GROWTH_STEP, SlotCache
from orthrus.types import GenerationResult

PROMPT = tiny_prompt(9)
DUAL = tiny_dual("llama", disturb=0.1)
WINDOWED = tiny_dual("gemma3", disturb=0.1)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_cache, "GROWTH_STEP", 4)


def decode(
    strategy: Strategy = "chain",
    floor: bool = True,
    *,
    dual: DualView = DUAL,
    prompt: list[int] = PROMPT,
    context_length: int = 256,
    **options: Any,
) -> tuple[GenerationResult, list[int]]:
    """The result, and the sizes that the cache had."""
    config = DecodeConfig(**{"max_new_tokens": 40, "strategy": strategy, "floor": floor, **options})
    sizes: list[int] = []
    with watch_passes(dual, lambda _p, cache, _h: sizes.append(cache.num_slots)):
        result = TokenStream(
            dual, prompt, config, eos_token_ids=frozenset(), context_length=context_length
        ).drain()
    return result, sorted(set(sizes))


def cache_of(lengths: list[int], num_slots: int) -> SlotCache:
    """One prompt per row; may grow to 64 slots."""
    cache = DUAL.new_cache(num_slots, batch_size=len(lengths))
    for row, length in enumerate(lengths):
        DUAL.run(prefill(torch.tensor([tiny_prompt(length, seed=row)]), [0]), cache.row(row))
        cache.commit(length, row)
    cache.max_slots = 64
    return cache


@pytest.mark.usefixtures("small_steps")
def test_growing_keeps_all_and_adds_empty_slots() -> None:
    cache = cache_of([7, 4], 10)
    DUAL.run(draft_block(torch.tensor([[5], [6]]), cache.lengths, 3, VOCAB - 1, floor=False), cache)
    before = [t.clone() for t in (*cache.keys, *cache.values, cache.positions_BS, cache.writers_BS)]
    cache.ensure(13)
    after = [*cache.keys, *cache.values, cache.positions_BS, cache.writers_BS]
    assert (cache.num_slots, cache.lengths) == (16, [7, 4])
    for old, new, empty in zip(before, after, [0] * (len(before) - 2) + [-1, 0], strict=True):
        dim = new.ndim - 2 if new.ndim == 4 else 1
        assert new.dtype == old.dtype
        assert torch.equal(new.narrow(dim, 0, 10), old)
        assert (new.narrow(dim, 10, 6) == empty).all()
    cache.check()


@pytest.mark.usefixtures("small_steps")
def test_a_cache_grows_by_a_quarter_or_what_is_needed_in_whole_steps_and_not_beyond_its_limit() -> None:
    cache = DUAL.new_cache(0)
    cache.max_slots = 63
    sizes = []
    for needed in (5, 8, 9, 13, 17, 21, 25, 29, 33, 50, 53, 63):
        cache.ensure(needed)
        sizes.append(cache.num_slots)
    assert sizes == [8, 8, 12, 16, 20, 28, 28, 36, 36, 52, 63, 63]
    with pytest.raises(UserInputError, match="needs 64 cache slots, but only 63"):
        cache.ensure(64)


def test_a_row_neither_grows_nor_outlives_the_growth_of_the_whole() -> None:
    cache = cache_of([7, 4], 10)
    row = cache.row(1)
    with pytest.raises(UserInputError, match="needs 11 cache slots, but only 10"):
        DUAL.run(prefill(torch.tensor([tiny_prompt(7)]), row.lengths), row)
    cache.ensure(11)
    with pytest.raises(AssertionError, match="outgrown"):
        DUAL.run(ar_step(torch.tensor([[5]]), row.lengths), row)
    again = cache.row(1)
    DUAL.run(prefill(torch.tensor([tiny_prompt(7)]), again.lengths), again)
    cache.commit(7, row=1)
    cache.check()


@pytest.mark.usefixtures("small_steps")
@torch.inference_mode()
def test_rows_of_a_batch_grow_together() -> None:
    """The longest row is the one that needs more; what all rows compute stays equal to the bit."""
    small, large = cache_of([7, 2, 10], 10), cache_of([7, 2, 10], 64)
    for num_rows in (3, 1, 6):
        ids_BT = torch.arange(5, 5 + 3 * num_rows).view(3, num_rows)
        p = verify_chain(ids_BT, small.lengths)
        assert torch.equal(DUAL.run(p, small), DUAL.run(p, large))
        for cache in (small, large):
            for row in range(3):
                cache.commit(num_rows, row)
            cache.check()
    assert small.lengths == [17, 12, 20]
    assert small.num_slots == 20


@EVERY_WAY
@pytest.mark.parametrize("dual", [DUAL, WINDOWED], ids=["llama", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_growth_does_not_change_the_text(
    temperature: float, dual: DualView, strategy: Strategy, floor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Growth every few tokens, in draft, verify and fused passes, against a cache made whole."""
    sampling = SamplingParams(temperature=temperature, seed=3)
    whole, sizes = decode(strategy, floor, dual=dual, sampling=sampling)
    assert len(sizes) == 1
    monkeypatch.setattr(slot_cache, "GROWTH_STEP", 4)
    grown, sizes = decode(strategy, floor, dual=dual, sampling=sampling)
    assert grown.token_ids == whole.token_ids
    assert [c.token_ids for c in grown.cycles] == [c.token_ids for c in whole.cycles]
    assert len(sizes) >= 3


@pytest.mark.usefixtures("small_steps")
@EVERY_WAY
@pytest.mark.parametrize("room", [1, 2, 5, 9])
def test_growth_at_the_end_of_the_context(room: int, strategy: Strategy, floor: bool) -> None:
    """Drafts are cut, every token that fits is made, and there is never more than context and head-room."""
    free, _ = decode("ar")
    result, sizes = decode(strategy, floor, context_length=len(PROMPT) + room)
    assert result.token_ids == free.token_ids[:room]
    head_room = {"ar": 0, "chain": 8, "tree": 24, "fused": 31, "fused_tree": 48}[strategy]
    assert sizes[-1] <= len(PROMPT) + room + head_room


@pytest.mark.parametrize("strategy", ["ar", "chain", "fused_tree", "auto"])
def test_what_was_asked_for_takes_no_memory_before_it_is_there(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orthrus.engine.stream.pass_costs", lambda _, **__: None)
    config = DecodeConfig(max_new_tokens=8000, strategy=strategy)
    running = TokenStream(DUAL, PROMPT, config, eos_token_ids=frozenset(), context_length=10_000)
    with watch_caches(DUAL) as caches:
        next(running)
    (cache,) = caches
    assert cache.num_slots <= GROWTH_STEP
    assert cache.max_slots >= len(PROMPT) + 8000
    assert cache.num_bytes == 2 * 2 * 2 * 8 * 4 * cache.num_slots


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("length", [7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("strategy", ["chain", "fused_tree"])
def test_a_prompt_in_chunks_reads_what_is_there_and_makes_no_larger_masks(
    strategy: Strategy, length: int
) -> None:
    prompt = tiny_prompt(length)
    at_once, _ = decode(strategy, prompt=prompt)
    chunked, sizes = decode(strategy, prompt=prompt, prefill_chunk=8)
    assert chunked.token_ids == at_once.token_ids
    assert len(sizes) > 1

    chunks: list[torch.Size] = []
    config = DecodeConfig(strategy=strategy, prefill_chunk=8)
    running = TokenStream(DUAL, prompt, config, eos_token_ids=frozenset(), context_length=256)
    with watch_passes(DUAL, lambda p, *_: chunks.append(p.visible_BTS.shape)):
        next(running)
    ends = [*range(8, length, 8), length]
    assert chunks == [(1, (end - 1) % 8 + 1, end) for end in ends]
