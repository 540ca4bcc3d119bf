"""Laws of tree and fused passes, for random histories, trees and blocks, on random models.

Each against a plain pass that knows no tree: the stock causal forward, or one block over a committed history.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.rows import Rows
from tests.tiny import VOCAB, tiny_dual
from torch import Tensor

from orthrus.decoding.tree import DraftTree
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Part, block, causal, tree
from orthrus.model.runner import EagerRunner

MASK = VOCAB - 1
NUM_SLOTS = 128
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
    seed: int

    def prefix(self, row: int) -> list[int]:
        """The tokens up to an AR row, its own included."""
        path = self.tree.paths()[row]
        return [*self.history, self.anchor, *(self.tree.token_ids[r - 1] for r in path)]

    def part(self, **other: Any) -> Part:
        c = replace(self, **other)
        return tree([c.anchor, *c.tree.token_ids], c.tree.parents, c.block_rows, c.block_size, MASK)


@st.composite
def cases(draw: Any) -> Case:
    """From an anchor alone to trees of 9 nodes of any shape, with up to 3 blocks, two at one row too."""
    token = st.integers(3, VOCAB - 2)
    num_nodes, block_size = draw(st.integers(0, 9)), draw(st.integers(1, 6))
    # Half of the trees lean to depth, so that paths outgrow the window together with the history.
    deep = draw(st.booleans())
    parents = [draw(st.integers(max(0, i - 2) if deep else 0, i)) for i in range(num_nodes)]
    return Case(
        # Some end just before the end of a page.
        history=draw(st.lists(token, max_size=28) | lists_of(token, 61)),
        anchor=draw(token),
        tree=DraftTree(draw(lists_of(token, num_nodes)), parents, [0.0] * num_nodes),
        block_rows=draw(st.lists(st.integers(0, num_nodes), max_size=3)),
        block_size=block_size,
        seed=draw(st.integers(0, 99)),
    )


def lists_of(elements: Any, size: int) -> Any:
    return st.lists(elements, min_size=size, max_size=size)


@cache
def dual_of(name: str) -> DualView:
    return tiny_dual(name, disturb=0.3)


@cache
def runner_of(name: str) -> EagerRunner:
    return EagerRunner(dual_of(name))


def committed(name: str, token_ids: list[int], seed: int = 0) -> Rows:
    """A request with a committed history, over scratch that holds rubbish of an earlier life."""
    rows = Rows(runner_of(name), NUM_SLOTS)
    generator = torch.Generator().manual_seed(seed)
    for store in (*rows.pool.keys, *rows.pool.values):
        store.normal_(0.0, 50.0, generator=generator)
    if seed % 2:
        rows.slots.pages.reverse()
    if token_ids:
        rows.feed(token_ids)
    return rows


def run(name: str, case: Case, part: Part) -> Tensor:
    """Logits (I, V) of all rows, in a pool of their own."""
    return committed(name, case.history, case.seed).logits(part)


def causal_logits(name: str, token_ids: list[int]) -> Tensor:
    """The slow oracle: the untouched model over the whole sequence, no cache; the last row's logits (V,)."""
    model = dual_of(name).stock()
    return model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]  # type: ignore[no-any-return]


def block_logits(name: str, case: Case, number: int) -> Tensor:
    """An ordinary block (K, V) over a committed history that ends before the block's anchor."""
    *before, anchor = case.prefix(case.block_rows[number])
    return committed(name, before, case.seed + 1).logits(block(anchor, case.block_size, MASK))


@FAMILIES
@laws
@given(case=cases())
@torch.inference_mode()
def test_every_row_gives_what_a_plain_pass_over_its_own_path_gives(name: str, case: Case) -> None:
    logits_IV = run(name, case, case.part())
    num_ar, size = case.tree.num_nodes + 1, case.block_size
    for row in range(num_ar):
        torch.testing.assert_close(logits_IV[row], causal_logits(name, case.prefix(row)), **close)
    for number in range(len(case.block_rows)):
        own_KV = logits_IV[num_ar + number * size :][:size]
        torch.testing.assert_close(own_KV, block_logits(name, case, number), **close)


@FAMILIES
@laws
@given(case=cases(), data=st.data())
@torch.inference_mode()
def test_ar_rows_never_see_the_blocks(name: str, case: Case, data: Any) -> None:
    """Bit-equal for other tokens in the blocks; equal but for rounding where the blocks are not there."""
    num_ar, size = case.tree.num_nodes + 1, case.block_size
    part = case.part()
    part.check()
    ar_IV = run(name, case, part)[:num_ar]
    other = data.draw(lists_of(st.integers(0, VOCAB - 1), size * len(case.block_rows)))
    changed = replace(part, token_ids=[*part.token_ids[:num_ar], *other])
    assert torch.equal(run(name, case, changed)[:num_ar], ar_IV)
    torch.testing.assert_close(run(name, case, case.part(block_rows=[])), ar_IV, **close)


@FAMILIES
@laws
@given(case=cases())
@torch.inference_mode()
def test_a_block_never_sees_another(name: str, case: Case) -> None:
    """Each block alone with the tree gives what it gives in company."""
    num_ar, size = case.tree.num_nodes + 1, case.block_size
    together_IV = run(name, case, case.part())[num_ar:]
    for number, row in enumerate(case.block_rows):
        alone_IV = run(name, case, case.part(block_rows=[row]))[num_ar:]
        torch.testing.assert_close(together_IV[number * size :][:size], alone_IV, **close)


@FAMILIES
@laws
@given(case=cases(), data=st.data())
@torch.inference_mode()
def test_compacting_an_accepted_path_leaves_what_a_prompt_writes(name: str, case: Case, data: Any) -> None:
    rows = committed(name, case.history, case.seed)
    rows.hidden(case.part())
    last = data.draw(st.integers(0, case.tree.num_nodes))
    rows.slots.compact([0, *case.tree.paths()[last]])
    as_if_fed(name, rows, case.prefix(last))


@laws
@given(case=cases(), data=st.data())
def test_check_sees_every_single_change(case: Case, data: Any) -> None:
    part = case.part()
    assume(part.tail_II is not None)
    assert part.tail_II is not None
    tail_II = part.tail_II.copy()
    row, other = (data.draw(st.integers(0, part.num_rows - 1)) for _ in range(2))
    tail_II[row, other] = not tail_II[row, other]
    with pytest.raises(AssertionError):
        replace(part, tail_II=tail_II).check()


@FAMILIES
@pytest.mark.parametrize("rows", [[], [0], [0, 1, 2, 3, 4]])
@torch.inference_mode()
def test_compacting_nothing_the_anchor_alone_and_a_whole_chain(name: str, rows: list[int]) -> None:
    chain = DraftTree([20, 21, 22, 23], [0, 1, 2, 3], [0.0] * 4)
    case = Case([5, 6, 7] * 5, 19, chain, [0, 4], 4, seed=3)
    request = committed(name, case.history, case.seed)
    request.hidden(case.part())
    request.slots.compact(rows)
    as_if_fed(name, request, [*case.history, 19, 20, 21, 22, 23][: len(case.history) + len(rows)])


def as_if_fed(name: str, rows: Rows, token_ids: list[int]) -> None:
    """Keys, values and ledger of the history, and what a next pass makes of them."""
    expected = committed(name, token_ids, seed=7)
    assert rows.length == expected.length == len(token_ids)
    rows.slots.check()
    for stored, fresh in zip(rows.stored(), expected.stored(), strict=True):
        torch.testing.assert_close(stored, fresh, **close)
    part = causal([30, 31])
    torch.testing.assert_close(rows.logits(part), expected.logits(part), **close)
