"""The slot cache: its bookkeeping, its integrity check, and rows of a batch that do not mix."""

import pytest
import torch
from tests.tiny import FAMILY_CONFIGS, VOCAB, disturb_view, tiny_dual, tiny_prompt
from torch import Tensor

from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass, draft_block, prefill, verify_chain
from orthrus.model.slot_cache import SlotCache

LENGTHS = [4, 19, 11]


def filled(dual: DualView, lengths: list[int], num_slots: int = 48) -> SlotCache:
    """A cache with one prompt per row, each prefilled alone through its row view."""
    cache = dual.new_cache(num_slots, batch_size=len(lengths))
    for row, length in enumerate(lengths):
        alone = cache.row(row)
        dual.run(prefill(torch.tensor([tiny_prompt(length, seed=row)]), alone.lengths), alone)
        cache.commit(length, row)
    cache.check()
    return cache


def snapshot(cache: SlotCache) -> list[Tensor]:
    return [t.clone() for t in (*cache.keys, *cache.values)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_bytes_are_keys_and_values_of_every_layer(name: str) -> None:
    dual = tiny_dual(name)
    config = dual.base.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = dual.new_cache(37, batch_size=3)
    expected = 2 * config.num_hidden_layers * 3 * config.num_key_value_heads * 37 * head_dim * 4
    assert cache.num_bytes == expected
    assert cache.num_slots == 37


def test_commit_and_roll_back_move_the_length_of_one_row() -> None:
    cache = tiny_dual().new_cache(8, batch_size=2)
    cache.commit(3, row=1)
    assert cache.lengths == [0, 3]
    assert cache.get_seq_length() == 3
    cache.roll_back(2, row=1)
    assert cache.lengths == [0, 1]
    with pytest.raises(AssertionError):
        cache.roll_back(2, row=1)
    with pytest.raises(AssertionError):
        cache.commit(9)
    with pytest.raises(AssertionError):
        cache.commit(-1)


def test_a_pass_that_does_not_fit_is_refused_in_one_sentence() -> None:
    dual = tiny_dual()
    with pytest.raises(UserInputError, match="needs 9 cache slots, but only 8"):
        dual.run(prefill(torch.tensor([tiny_prompt(9)]), [0]), dual.new_cache(8))


def test_check_names_the_slot_that_nobody_or_the_wrong_view_wrote() -> None:
    dual = tiny_dual()
    cache = filled(dual, [4])
    cache.commit(1)
    with pytest.raises(AssertionError, match="row 0, slot 4: position -1, writer nobody"):
        cache.check()
    cache.roll_back(1)
    dual.run(draft_block(torch.tensor([[5]]), cache.lengths, 4, VOCAB - 1, floor=False), cache)
    cache.check()
    cache.commit(1)
    with pytest.raises(AssertionError, match="slot 4: position 4, writer diffusion"):
        cache.check()


def test_check_sees_a_wrong_position() -> None:
    cache = filled(tiny_dual(), [4, 6])
    cache.positions_BS[1, 2] = 3
    with pytest.raises(AssertionError, match="row 1, slot 2: position 3, writer ar"):
        cache.check()


@torch.inference_mode()
def test_scratch_is_never_read() -> None:
    """Whatever the slots behind the history hold, be it huge, the next passes come out bit-equal."""
    dual = tiny_dual("mistral", disturb=0.3)
    outcomes = []
    for rubbish in (0.0, 1e30):
        cache = filled(dual, [17])
        for store in (*cache.keys, *cache.values):
            store[:, :, 17:] = rubbish
        draft_V = dual.run(draft_block(torch.tensor([[5]]), [17], 6, VOCAB - 1, floor=True), cache)
        cache.commit(1)
        for store in (*cache.keys, *cache.values):
            store[:, :, 18:] += rubbish
        outcomes.append((draft_V, dual.run(verify_chain(torch.tensor([[7, 8, 9]]), [18]), cache)))
    for clean, dirty in zip(*outcomes, strict=True):
        assert torch.equal(clean, dirty)


@torch.inference_mode()
def test_history_is_not_written_by_later_passes() -> None:
    dual = tiny_dual(disturb=0.3)
    cache = filled(dual, [9])
    before = [t[:, :, :9].clone() for t in snapshot(cache)]
    dual.run(draft_block(torch.tensor([[5]]), [9], 8, VOCAB - 1, floor=True), cache)
    dual.run(verify_chain(torch.tensor([[7, 8, 9]]), [9]), cache)
    assert all(torch.equal(t[:, :, :9], b) for t, b in zip(snapshot(cache), before, strict=True))


@torch.inference_mode()
def test_rolling_back_and_going_on_is_as_if_nothing_had_been() -> None:
    dual = tiny_dual()
    straight, detour = filled(dual, [9]), filled(dual, [9])
    dual.run(verify_chain(torch.tensor([[40, 41, 42]]), detour.lengths), detour)
    detour.commit(3)
    detour.roll_back(3)
    ids_BT = torch.tensor([[7, 8]])
    expected = dual.run(verify_chain(ids_BT, straight.lengths), straight)
    assert torch.equal(dual.run(verify_chain(ids_BT, detour.lengths), detour), expected)


@torch.inference_mode()
def test_compact_gathers_a_path_as_if_it_had_been_decoded_in_order() -> None:
    """Two branches behind the history; the second is accepted and moved over the first."""
    dual = tiny_dual()
    ordered, tree = filled(dual, [6, 5]), filled(dual, [6, 5])
    alone = ordered.row(1)
    dual.run(verify_chain(torch.tensor([[10, 12, 14]]), alone.lengths), alone)
    ordered.commit(3, row=1)

    branch = tree.row(1)
    # Slots 5..9: token 10 at position 5, then siblings 11 and 12 at 6, and their children 13 and 14 at 7.
    parents = {5: [], 6: [5], 7: [5], 8: [5, 6], 9: [5, 7]}
    visible_BTS = torch.zeros(1, 5, 10, dtype=torch.bool)
    for row, (slot, ancestors) in enumerate(parents.items()):
        visible_BTS[0, row, [*range(5), *ancestors, slot]] = True
    p = Pass(
        token_ids_BT=torch.tensor([[10, 11, 12, 13, 14]]),
        position_ids_BT=torch.tensor([[5, 6, 6, 7, 7]]),
        slots_BT=torch.arange(5, 10)[None],
        visible_BTS=visible_BTS,
        num_ar_rows=5,
        logit_rows_R=torch.arange(5),
    )
    dual.run(p, branch)
    tree.compact([5, 7, 9], row=1)

    assert tree.lengths == [6, 8]
    tree.check()
    for moved, expected in zip(snapshot(tree), snapshot(ordered), strict=True):
        torch.testing.assert_close(moved[1, :, :8], expected[1, :, :8])
        assert torch.equal(moved[0, :, :6], expected[0, :, :6])
    with pytest.raises(AssertionError, match="lies in scratch"):
        tree.compact([3], row=1)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@torch.inference_mode()
def test_a_window_hides_what_lies_far_back_and_nothing_of_the_block(name: str) -> None:
    """Window 12, a block of 20: row at position p reads history from p - 11 on, and the whole block."""
    dual, length, block_size = tiny_dual(name, block_size=20), 19, 20
    cache = filled(dual, [length])
    p = draft_block(torch.tensor([[5]]), [length], block_size, VOCAB - 1, floor=True)
    cache.begin(p)
    masks = dual.masks(p, cache)
    windowed_TS = (masks["sliding_attention"] if isinstance(masks, dict) else masks)[0, 0]
    for row, position in enumerate([length, *range(length, length + block_size)]):
        history = set(range(max(0, position - 11), length))
        own = {length} if row == 0 else set(range(length + 1, length + 1 + block_size))
        # Within the block the window counts back too.
        own = {slot for slot in own if position - (slot - min(1, row)) < 12}
        assert set(windowed_TS[row].nonzero()[:, 0].tolist()) == history | own
    if isinstance(masks, dict):
        assert torch.equal(masks["full_attention"][0, 0], p.visible_BTS[0])


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
@torch.inference_mode()
def test_rows_of_a_batch_give_what_each_gives_alone(name: str) -> None:
    """Different lengths, drafts with floor, then a verify pass: logits and stored keys of every row."""
    dual = tiny_dual(name)
    disturb_view(dual, 0.3)
    batch, alone = filled(dual, LENGTHS), [filled(dual, LENGTHS).row(i) for i in range(3)]
    anchors_B1 = torch.tensor([[5], [17], [33]])
    drafts_BT = torch.tensor([[7, 8, 9], [20, 21, 22], [40, 41, 42]])

    def both(build: object, ids_BT: Tensor, **options: object) -> None:
        together_BRV = dual.run(build(ids_BT, batch.lengths, **options), batch)  # type: ignore[operator]
        for i, single in enumerate(alone):
            expected_1RV = dual.run(build(ids_BT[i : i + 1], single.lengths, **options), single)  # type: ignore[operator]
            torch.testing.assert_close(together_BRV[i], expected_1RV[0], atol=1e-5, rtol=1e-5)

    both(draft_block, anchors_B1, block_size=5, mask_token_id=VOCAB - 1, floor=True)
    for i, single in enumerate(alone):
        batch.commit(1, row=i)
        single.commit(1)
    batch.check()
    both(verify_chain, drafts_BT)
    for i, single in enumerate(alone):
        batch.commit(3, row=i)
        single.commit(3)
    batch.check()
    for stored, *singles in zip(snapshot(batch), *(snapshot(s) for s in alone), strict=True):
        for i, single in enumerate(singles):
            end = LENGTHS[i] + 4
            torch.testing.assert_close(stored[i, :, :end], single[0, :, :end], atol=1e-5, rtol=1e-5)
