"""The pool of slots: who owns which page, what the ledger says, and histories that do not mix."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.rows import Rows
from tests.tiny import FAMILY_CONFIGS, VOCAB, disturb_view, tiny_dual, tiny_prompt
from torch import Tensor

from orthrus.model.attention import RunningPass
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Part, block, causal, join, tree
from orthrus.model.pool import NOBODY, PAGE, SlotPool, Slots, pages_for, slot_bytes
from orthrus.model.runner import EagerRunner

LENGTHS = [4, 19, 11]
MASK = VOCAB - 1


def pool_of(num_pages: int, name: str = "llama") -> SlotPool:
    return SlotPool(FAMILY_CONFIGS[name], num_pages)


def filled(dual: DualView, length: int, seed: int = 0, num_slots: int = 128, **options: Any) -> Rows:
    rows = Rows(dual, num_slots, **options)
    rows.feed(tiny_prompt(length, seed=seed))
    rows.slots.check()
    return rows


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_bytes_are_keys_and_values_of_every_layer(name: str) -> None:
    config = FAMILY_CONFIGS[name]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    expected = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4
    assert slot_bytes(config, torch.float32) == expected
    pool = pool_of(3, name)
    assert sum(store.nbytes for store in (*pool.keys, *pool.values)) == 3 * PAGE * expected
    assert (pool.num_slots, pool.num_free) == (3 * PAGE, 3)


def test_pages_for_slots() -> None:
    assert [pages_for(n) for n in (0, 1, PAGE, PAGE + 1, 3 * PAGE)] == [0, 1, 1, 2, 3]


def test_low_pages_are_taken_first_and_the_last_owner_frees_a_page() -> None:
    pool = pool_of(4)
    assert [pool.take() for _ in range(3)] == [0, 1, 2]
    pool.share(1)
    assert pool.owners(1) == 2
    pool.release(1)
    assert (pool.owners(1), pool.num_free) == (1, 1)
    pool.release(1)
    pool.release(0)
    assert (pool.owners(1), pool.num_free) == (0, 3)
    assert [pool.take() for _ in range(4)] == [0, 1, 3, None]
    for call in (pool.share, pool.release):
        pool.release(3) if pool.owners(3) else None
        with pytest.raises(AssertionError, match="nobody owns"):
            call(3)


def test_a_page_that_is_taken_again_was_written_by_nobody() -> None:
    dual = tiny_dual()
    rows = filled(dual, 9, num_slots=PAGE)
    (page,) = rows.slots.pages
    rows.slots.free()
    assert rows.pool.take() == page
    assert set(rows.pool.writers_S[page * PAGE : (page + 1) * PAGE]) == {NOBODY}


def test_slots_that_the_pool_does_not_have_change_nothing() -> None:
    pool = pool_of(3)
    first, second = Slots(pool), Slots(pool)
    assert first.reserve(PAGE + 1)
    assert (first.num_slots, len(first.pages)) == (2 * PAGE, 2)
    assert not second.reserve(PAGE + 1)
    assert (second.pages, pool.num_free) == ([], 1)
    assert first.reserve(5)
    assert len(first.pages) == 2
    first.free()
    assert (first.pages, first.length, pool.num_free) == ([], 0, 3)


def test_adopted_pages_are_shared_history() -> None:
    pool = pool_of(4)
    first, second = Slots(pool), Slots(pool)
    first.reserve(2 * PAGE)
    first.commit(2 * PAGE)
    second.adopt(first.pages)
    assert second.length == 2 * PAGE
    assert [pool.owners(page) for page in first.pages] == [2, 2]
    first.free()
    assert [pool.owners(page) for page in second.pages] == [1, 1]
    with pytest.raises(AssertionError, match="only an empty request"):
        second.adopt([0])


def test_places_follow_the_pages() -> None:
    slots = Slots(pool_of(9))
    slots.pages = [7, 2]
    assert slots.places(np.array([0, 63, 64, 70])).tolist() == [448, 511, 128, 134]


def test_only_scratch_can_be_committed() -> None:
    slots = Slots(pool_of(1))
    slots.reserve(10)
    slots.commit(3)
    assert slots.length == 3
    for wrong in (PAGE, -1):
        with pytest.raises(AssertionError):
            slots.commit(wrong)


def test_check_names_the_slot_that_nobody_or_the_wrong_view_wrote() -> None:
    rows = filled(tiny_dual(), 4)
    rows.slots.commit(1)
    with pytest.raises(AssertionError, match="slot 4 holds position -1, written by nobody"):
        rows.slots.check()
    rows.slots.length = 4
    rows.hidden(block(5, 4, MASK))
    rows.slots.check()
    rows.slots.commit(1)
    with pytest.raises(AssertionError, match="slot 4 holds position 4, written by the diffusion view"):
        rows.slots.check()


def test_check_sees_a_wrong_position() -> None:
    rows = filled(tiny_dual(), 6)
    rows.pool.positions_S[rows.slots.places(np.array([2]))] = 3
    with pytest.raises(AssertionError, match="slot 2 holds position 3, written by the AR view"):
        rows.slots.check()


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
@pytest.mark.parametrize("rubbish", [1e30, torch.inf, torch.nan])
def test_scratch_is_never_read(name: str, rubbish: float) -> None:
    """Whatever the slots behind the history hold, the next passes come out bit-equal."""
    dual = tiny_dual(name, disturb=0.3)
    outcomes = []
    for content in (0.0, rubbish):
        rows = filled(dual, 17)
        for store in (*rows.pool.keys, *rows.pool.values):
            store[:, :, 17:] = content
        found = [rows.logits(tree([5], [], [0], 6, MASK))]
        rows.slots.commit(1)
        for store in (*rows.pool.keys, *rows.pool.values):
            store[:, :, 18:] += content
        outcomes.append([*found, rows.logits(causal([7, 8, 9]))])
    for clean, dirty in zip(*outcomes, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_ar_row_never_meets_what_a_diffusion_row_wrote(name: str) -> None:
    """Diffusion rows that are no numbers at all leave the AR rows of their own pass as they are."""
    clean, broken = tiny_dual(name), tiny_dual(name)
    with torch.no_grad():
        for parameter in broken.view_parameters().values():
            parameter.fill_(torch.nan)
    part = tree([5, 6, 7, 8], [0, 0, 1], [0, 3], 4, MASK)
    ours, theirs = (filled(dual, 17).logits(part) for dual in (broken, clean))
    assert ours[4:].isnan().all()
    assert torch.equal(ours[:4], theirs[:4])


def test_history_is_not_written_by_later_passes() -> None:
    rows = filled(tiny_dual(disturb=0.3), 9)
    before = rows.stored()
    rows.hidden(tree([5], [], [0], 8, MASK))
    rows.hidden(causal([7, 8, 9]))
    assert all(torch.equal(a, b) for a, b in zip(rows.stored(), before, strict=True))


def test_compact_gathers_a_path_as_if_it_had_been_decoded_in_order() -> None:
    """Two branches behind the history, over the end of a page; the second is accepted and moved over the first."""
    dual = tiny_dual()
    for length in (5, PAGE - 3):
        ordered, branched = filled(dual, length), filled(dual, length)
        ordered.feed([10, 12, 14])
        # Token 10, then siblings 11 and 12, and their children 13 and 14.
        branched.hidden(tree([10, 11, 12, 13, 14], [0, 0, 1, 2]))
        branched.slots.compact([0, 2, 4])
        assert branched.length == length + 3
        branched.slots.check()
        for moved, expected in zip(branched.stored(), ordered.stored(), strict=True):
            torch.testing.assert_close(moved, expected)


def test_a_path_that_lies_in_its_place_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[int, int]] = []

    def note(_: list[Tensor], sources: list[int], targets: list[int]) -> None:
        moves.extend(zip(sources, targets, strict=True))

    pool = SlotPool(FAMILY_CONFIGS["llama"], 2, move=note)
    slots = Slots(pool)
    slots.reserve(40)
    slots.commit(7)
    slots.compact([0, 1, 2])
    assert (moves, slots.length) == ([], 10)
    slots.compact([0, 2, 3])
    assert moves == [(12, 11), (13, 12)]
    slots.compact([])
    assert slots.length == 13


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_window_hides_what_lies_far_back_and_nothing_else(name: str) -> None:
    """Window 12, a block of 20: the row at position p reads positions from p - 11 on, and what lies ahead."""
    dual, length, size = tiny_dual(name, block_size=20), 19, 20
    rows = filled(dual, length)
    runner = rows.runner
    assert isinstance(runner, EagerRunner)
    p = join([(tree([5], [], [0], size, MASK), rows.slots)])
    running = RunningPass(p, rows.pool, runner._windows)
    whole, windowed = (running.groups(window, 1, torch.float32) for window in (None, 12))
    for (group, mask_QN), (_, seen_QN) in zip(windowed, whole, strict=True):
        positions_N = group.key_positions_N
        for query, position in enumerate(group.query_positions_Q.tolist()):
            expected_N = (seen_QN[query] == 0) & (position - positions_N < 12)
            assert ((mask_QN[query] == 0) == expected_N).all()
    assert [len(group.query_positions_Q) for group, _ in windowed] == [1, size]
    assert set(runner._windows) == ({12} if name == "mistral" else {12, None})


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
@torch.inference_mode()
def test_requests_in_one_pass_give_what_each_gives_alone(name: str) -> None:
    """Different lengths and kinds of parts in one pass: hidden states and stored keys of each request."""
    dual = tiny_dual(name)
    disturb_view(dual, 0.3)
    runner = EagerRunner(dual)
    pool = runner.new_pool(6)
    # Pages of the three lie mixed up.
    together = [Rows(runner, 40, pool=pool) for _ in LENGTHS]
    for rows in together:
        assert rows.slots.reserve(80)
    alone = [Rows(runner, 80) for _ in LENGTHS]

    def both(parts: list[Part]) -> None:
        p = join([(part, rows.slots) for part, rows in zip(parts, together, strict=True)])
        hidden_RC = runner.hidden(p, pool)
        for part, span, rows in zip(parts, p.spans, alone, strict=True):
            own_IC = torch.cat([hidden_RC[span.ar_rows], hidden_RC[span.draft_rows]])
            torch.testing.assert_close(own_IC, rows.hidden(part), atol=2e-5, rtol=2e-5)

    def commit(numbers: list[int]) -> None:
        for number, *pair in zip(numbers, together, alone, strict=True):
            for rows in pair:
                rows.slots.compact(list(range(number)))
                rows.slots.check()

    prompts = [tiny_prompt(length, seed=i) for i, length in enumerate(LENGTHS)]
    both([causal(prompt) for prompt in prompts])
    commit(LENGTHS)
    both([tree([5], [], [0], 5, MASK), block(17, 5, MASK), tree([33, 7, 8], [0, 0], [0, 2], 5, MASK)])
    commit([1, 0, 1])
    both([causal([7, 8, 9]), tree([20, 21, 22], [0, 0]), causal([40])])
    commit([3, 1, 1])
    for ours, theirs in zip(together, alone, strict=True):
        for stored, expected in zip(ours.stored(), theirs.stored(), strict=True):
            torch.testing.assert_close(stored, expected, atol=2e-5, rtol=2e-5)
