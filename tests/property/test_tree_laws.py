"""Laws of tree and fused passes, for random histories, trees and blocks, on random models.

Each against a plain pass that knows no tree: the stock causal forward, or one block over a committed history.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import VOCAB, tiny_dual
from torch import Tensor

from orthrus.decoding.tree import DraftTree
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass, draft_block, fused, prefill, verify_chain, verify_tree
from orthrus.model.slot_cache import SlotCache

MASK = VOCAB - 1
NUM_SLOTS = 96
# Windows of 12 positions: in every layer, and in every other one.
FAMILIES = pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
laws = settings(max_examples=60, deadline=None, derandomize=True)
close = {"atol": 2e-5, "rtol": 2e-5}


@dataclass(frozen=True)
class Case:
    history: list[int]
    anchor: int
    tree: DraftTree
    block_rows: list[int]
    block_size: int
    given: list[list[int]]
    seed: int

    def prefix(self, row: int) -> list[int]:
        """The tokens up to an AR row, its own included."""
        path = self.tree.paths()[row]
        return [*self.history, self.anchor, *(self.tree.token_ids[r - 1] for r in path)]

    def rows(self) -> Tensor:
        return torch.tensor([[self.anchor, *self.tree.token_ids]])

    def fused(self, **other: Any) -> Pass:
        c = replace(self, **other)
        return fused(c.rows(), c.tree.parents, [len(c.history)], c.block_rows, c.block_size, MASK, c.given)


@st.composite
def cases(draw: Any) -> Case:
    """From an anchor alone to trees of 9 nodes of any shape, with up to 3 blocks, two at one row too."""
    token = st.integers(3, VOCAB - 2)
    num_nodes, block_size = draw(st.integers(0, 9)), draw(st.integers(1, 6))
    # Half of the trees lean to depth, so that paths outgrow the window together with the history.
    deep = draw(st.booleans())
    parents = [draw(st.integers(max(0, i - 2) if deep else 0, i)) for i in range(num_nodes)]
    block_rows = draw(st.lists(st.integers(0, num_nodes), max_size=3))
    known = st.lists(token, max_size=block_size - 1)
    return Case(
        history=draw(st.lists(token, max_size=28)),
        anchor=draw(token),
        tree=DraftTree(draw(lists_of(token, num_nodes)), parents, [0.0] * num_nodes),
        block_rows=block_rows,
        block_size=block_size,
        given=draw(st.just([]) | lists_of(known, len(block_rows))),
        seed=draw(st.integers(0, 99)),
    )


def lists_of(elements: Any, size: int) -> Any:
    return st.lists(elements, min_size=size, max_size=size)


@cache
def dual_of(name: str) -> DualView:
    return tiny_dual(name, disturb=0.3)


def committed(name: str, token_ids: list[int], seed: int = 0, num_slots: int = NUM_SLOTS) -> SlotCache:
    """A cache with a prefilled history, over scratch that holds rubbish of an earlier life."""
    cache_ = dual_of(name).new_cache(num_slots)
    generator = torch.Generator().manual_seed(seed)
    for store in (*cache_.keys, *cache_.values):
        store.normal_(0.0, 50.0, generator=generator)
    cache_.positions_BS.random_(0, 60, generator=generator)
    cache_.writers_BS.random_(0, 3, generator=generator)
    if token_ids:
        dual_of(name).run(prefill(torch.tensor([token_ids]), [0]), cache_)
        cache_.commit(len(token_ids))
    return cache_


def run(name: str, case: Case, p: Pass) -> Tensor:
    """Logits (T, V) of all rows, in a cache of their own."""
    p = replace(p, logit_rows_R=torch.arange(p.num_rows))
    return dual_of(name).run(p, committed(name, case.history, case.seed))[0]


def causal_logits(name: str, token_ids: list[int]) -> Tensor:
    """The slow oracle: the untouched model over the whole sequence, no cache; the last row's logits (V,)."""
    with dual_of(name).stock() as model:
        return model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]


def block_logits(name: str, case: Case, block: int) -> Tensor:
    """An ordinary block (K, V) over a committed history that ends before the block's anchor."""
    *before, anchor = case.prefix(case.block_rows[block])
    p = draft_block(torch.tensor([[anchor]]), [len(before)], case.block_size, MASK, floor=False)
    token_ids_BT = p.token_ids_BT.clone()
    if case.given and (known := case.given[block]):
        token_ids_BT[0, 1 : 1 + len(known)] = torch.tensor(known)
    p = replace(p, token_ids_BT=token_ids_BT, logit_rows_R=torch.arange(case.block_size))
    return dual_of(name).run(p, committed(name, before, case.seed + 1))[0]


@FAMILIES
@laws
@given(case=cases())
@torch.inference_mode()
def test_every_row_gives_what_a_plain_pass_over_its_own_path_gives(name: str, case: Case) -> None:
    logits_RV = run(name, case, case.fused())
    num_ar, size = case.tree.num_nodes + 1, case.block_size
    for row in range(num_ar):
        torch.testing.assert_close(logits_RV[row], causal_logits(name, case.prefix(row)), **close)
    for block in range(len(case.block_rows)):
        own_KV = logits_RV[num_ar + block * size :][:size]
        torch.testing.assert_close(own_KV, block_logits(name, case, block), **close)


@FAMILIES
@laws
@given(case=cases(), data=st.data())
@torch.inference_mode()
def test_ar_rows_never_see_the_blocks(name: str, case: Case, data: Any) -> None:
    """Bit-equal for other tokens in the blocks; equal but for rounding where the blocks are not there."""
    num_ar, size = case.tree.num_nodes + 1, case.block_size
    p = case.fused()
    p.check([len(case.history)])
    ar_RV = run(name, case, p)[:num_ar]
    token_ids_BT = p.token_ids_BT.clone()
    other = data.draw(lists_of(st.integers(0, VOCAB - 1), size * len(case.block_rows)))
    token_ids_BT[0, num_ar:] = torch.tensor(other)
    assert torch.equal(run(name, case, replace(p, token_ids_BT=token_ids_BT))[:num_ar], ar_RV)
    alone = verify_tree(case.rows(), case.tree.parents, [len(case.history)])
    torch.testing.assert_close(run(name, case, alone), ar_RV, **close)


@FAMILIES
@laws
@given(case=cases())
@torch.inference_mode()
def test_a_block_never_sees_another(name: str, case: Case) -> None:
    """Each block alone with the tree gives what it gives in company."""
    num_ar, size = case.tree.num_nodes + 1, case.block_size
    together_RV = run(name, case, case.fused())[num_ar:]
    for block, row in enumerate(case.block_rows):
        given = case.given[block : block + 1]
        alone_RV = run(name, case, case.fused(block_rows=[row], given=given))[num_ar:]
        torch.testing.assert_close(together_RV[block * size :][:size], alone_RV, **close)


@FAMILIES
@laws
@given(case=cases(), data=st.data())
@torch.inference_mode()
def test_compacting_an_accepted_path_leaves_what_a_prefill_writes(name: str, case: Case, data: Any) -> None:
    dual, start = dual_of(name), len(case.history)
    cache_ = committed(name, case.history, case.seed)
    dual.run(case.fused(), cache_)
    last = data.draw(st.integers(0, case.tree.num_nodes))
    rows = [0, *case.tree.paths()[last]]
    cache_.compact([start + row for row in rows])

    as_if_prefilled(name, cache_, case.prefix(last))


@FAMILIES
@laws
@given(case=cases(), data=st.data())
@torch.inference_mode()
def test_a_cache_that_grows_for_a_pass_gives_what_a_large_one_gives(name: str, case: Case, data: Any) -> None:
    """To the bit: logits, the history after an accepted path, and the pass after that."""
    dual, p, start = dual_of(name), case.fused(), len(case.history)
    large = committed(name, case.history, case.seed)
    small = committed(name, case.history, case.seed, data.draw(st.integers(start, p.num_slots - 1)))
    small.max_slots = NUM_SLOTS
    assert torch.equal(dual.run(p, small), dual.run(p, large))
    last = data.draw(st.integers(0, case.tree.num_nodes))
    for cache_ in (small, large):
        cache_.compact([start + row for row in (0, *case.tree.paths()[last])])
        cache_.check()
    assert small.lengths == large.lengths
    after = verify_chain(torch.tensor([[30, 31]]), small.lengths)
    assert torch.equal(dual.run(after, small), dual.run(after, large))


@laws
@given(case=cases(), data=st.data())
def test_check_sees_every_single_change_and_every_hole_in_the_history(case: Case, data: Any) -> None:
    p, length = case.fused(), len(case.history)
    row = data.draw(st.integers(0, p.num_rows - 1))
    visible_BTS = p.visible_BTS.clone()
    slot = data.draw(st.integers(0, p.num_slots - 1))
    visible_BTS[0, row, slot] = not visible_BTS[0, row, slot]
    hidden = (~p.visible_BTS[0, row]).nonzero()[:, 0].tolist()
    if slot < length and hidden:
        # Another slot in its place, so that the number of slots read is right.
        visible_BTS[0, row, data.draw(st.sampled_from(hidden))] = True
    with pytest.raises(AssertionError):
        replace(p, visible_BTS=visible_BTS).check([length])


@FAMILIES
@pytest.mark.parametrize("rows", [[], [0], [0, 1, 2, 3, 4]])
@torch.inference_mode()
def test_compacting_nothing_the_anchor_alone_and_a_whole_chain(name: str, rows: list[int]) -> None:
    chain = DraftTree([20, 21, 22, 23], [0, 1, 2, 3], [0.0] * 4)
    case = Case([5, 6, 7] * 5, 19, chain, [0, 4], 4, [], seed=3)
    cache_ = committed(name, case.history, case.seed)
    dual_of(name).run(case.fused(), cache_)
    cache_.compact([len(case.history) + row for row in rows])
    as_if_prefilled(name, cache_, [*case.history, 19, 20, 21, 22, 23][: len(case.history) + len(rows)])


def as_if_prefilled(name: str, cache_: SlotCache, token_ids: list[int]) -> None:
    """Keys, values and ledgers of the history, and what a next pass makes of them."""
    dual, length = dual_of(name), len(token_ids)
    expected = committed(name, token_ids, seed=7)
    assert cache_.lengths == expected.lengths == [length]
    cache_.check()
    for stored, fresh in zip((*cache_.keys, *cache_.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(stored[:, :, :length], fresh[:, :, :length], **close)
    assert torch.equal(cache_.positions_BS[:, :length], expected.positions_BS[:, :length])
    assert torch.equal(cache_.writers_BS[:, :length], expected.writers_BS[:, :length])
    p = verify_chain(torch.tensor([[30, 31]]), [length])
    torch.testing.assert_close(dual.run(p, cache_), dual.run(p, expected), **close)
