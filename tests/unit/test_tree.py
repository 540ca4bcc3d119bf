"""Draft trees against brute force: all prefixes, listed and sorted."""

from dataclasses import replace
from itertools import pairwise, product
from math import exp, inf, log, prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus.decoding.tree import (
    EMPTY_TREE,
    Candidates,
    DraftTree,
    accepted_rows,
    best_first_tree,
    chain_tree,
    rejected_ids,
)

many = settings(max_examples=150, deadline=None, derandomize=True)
# Sums of these are exact in floating point, so equal scores are common and really equal.
LOG_PROBS = st.sampled_from([0.0, -0.5, -1.0, -1.5, -2.0, -4.0])


@st.composite
def candidates(draw: Any, max_depth: int = 4, max_width: int = 4) -> Candidates:
    depth, width = draw(st.integers(0, max_depth)), draw(st.integers(1, max_width))
    rows = st.lists(LOG_PROBS, min_size=width, max_size=width).map(lambda row: sorted(row, reverse=True))
    log_probs_DC = draw(st.lists(rows, min_size=depth, max_size=depth))
    token_ids_DC = [draw(st.permutations(range(10 * d, 10 * d + width))) for d in range(depth)]
    return Candidates(token_ids_DC, log_probs_DC)


@st.composite
def candidates_with_pairs(draw: Any) -> Candidates:
    """Tables in no order: the best child differs from parent to parent."""
    c = draw(candidates())
    width = len(c.token_ids_DC[0]) if c else 0
    row = st.lists(LOG_PROBS, min_size=width, max_size=width)
    table = st.lists(row, min_size=width, max_size=width)
    return replace(c, pairs_DPC=[[], *(draw(table) for _ in range(1, len(c)))])


EITHER = st.one_of(candidates(), candidates_with_pairs())


def brute_force(c: Candidates, budget: int) -> list[Any]:
    """The best prefixes as (token path, log prob): every rank tuple, sorted by the documented order."""
    width = len(c.token_ids_DC[0]) if c else 0

    def step(ranks: tuple[int, ...]) -> float:
        d = len(ranks) - 1
        if d and c.pairs_DPC is not None:
            return c.pairs_DPC[d][ranks[-2]][ranks[-1]]
        return c.log_probs_DC[d][ranks[-1]]

    def score(ranks: tuple[int, ...]) -> float:
        return sum(step(ranks[: i + 1]) for i in range(len(ranks)))

    def order(ranks: tuple[int, ...]) -> Any:
        return (-score(ranks), len(ranks), order(ranks[:-1]), -step(ranks), ranks[-1]) if ranks else ()

    prefixes = [r for d in range(1, len(c) + 1) for r in product(range(width), repeat=d)]
    best = sorted(prefixes, key=order)[: max(0, budget)]
    return [(tuple(c.token_ids_DC[d][r] for d, r in enumerate(ranks)), score(ranks)) for ranks in best]


def token_paths(tree: DraftTree) -> list[tuple[int, ...]]:
    return [tuple(tree.token_ids[row - 1] for row in path) for path in tree.paths()[1:]]


def is_a_tree(tree: DraftTree) -> None:
    """Parents first, prefix-closed, no duplicates; and the accessors agree with each other."""
    paths = token_paths(tree)
    assert len(tree.token_ids) == len(tree.parents) == len(tree.log_probs) == tree.num_nodes
    assert all(0 <= parent < row for row, parent in enumerate(tree.parents, start=1))
    assert len(set(paths)) == len(paths)
    assert {path[:-1] for path in paths} <= {(), *paths}
    assert tree.depths() == [len(path) for path in paths]
    flat = {(parent, t): row for parent, kids in enumerate(tree.children()) for t, row in kids.items()}
    assert flat == {(p, t): i + 1 for i, (p, t) in enumerate(zip(tree.parents, tree.token_ids, strict=True))}


@many
@given(c=EITHER, budget=st.integers(-1, 400))
def test_the_best_tree_is_the_most_probable_prefixes(c: Candidates, budget: int) -> None:
    """Also where the budget is larger than the number of prefixes, and where many scores are equal."""
    tree = best_first_tree(c, budget)
    is_a_tree(tree)
    assert list(zip(token_paths(tree), tree.log_probs, strict=True)) == brute_force(c, budget)


@many
@given(c=candidates(), budget=st.integers(0, 30))
def test_pairs_that_ignore_the_parent_change_nothing(c: Candidates, budget: int) -> None:
    blind = replace(c, pairs_DPC=[[row] * len(row) for row in c.log_probs_DC])
    assert best_first_tree(blind, budget) == best_first_tree(c, budget)
    assert chain_tree(blind, budget) == chain_tree(c, budget)


@many
@given(c=candidates(), budget=st.integers(0, 60), extra=st.integers(0, 20))
def test_a_smaller_budget_gives_the_start_of_the_larger_tree(c: Candidates, budget: int, extra: int) -> None:
    small, large = best_first_tree(c, budget), best_first_tree(c, budget + extra)
    n = small.num_nodes
    assert (large.token_ids[:n], large.parents[:n]) == (small.token_ids, small.parents)


@many
@given(c=candidates(max_depth=3, max_width=3), budget=st.integers(1, 12), data=st.data())
def test_no_other_tree_of_the_size_has_a_larger_sum_of_probabilities(
    c: Candidates, budget: int, data: Any
) -> None:
    """Another tree: grown from the root, one prefix at a time, as chance has it."""
    width = len(c.token_ids_DC[0]) if c else 0
    grown: list[tuple[int, ...]] = []
    for _ in range(budget):
        edge = [(*p, r) for p in [(), *grown] if len(p) < len(c) for r in range(width)]
        edge = [p for p in edge if p not in grown]
        if edge:
            grown.append(data.draw(st.sampled_from(edge)))
    other = sum(prod(exp(c.log_probs_DC[d][r]) for d, r in enumerate(p)) for p in grown)
    assert sum(map(exp, best_first_tree(c, budget).log_probs)) >= other - 1e-9


def test_candidates_of_probability_zero_take_no_row() -> None:
    c = Candidates([[1, 2, 3], [4, 5, 6]], [[0.0, -inf, -inf], [-0.7, -0.7, -inf]])
    assert token_paths(best_first_tree(c, 10)) == [(1,), (1, 4), (1, 5)]
    pairs = [[], [[-0.1, -0.1], [-inf, -inf]]]
    nothing_after_2 = Candidates([[1, 2], [3, 4]], [[-0.7, -0.7]] * 2, pairs)
    assert set(token_paths(best_first_tree(nothing_after_2, 10))) == {(1,), (2,), (1, 3), (1, 4)}


@given(c=candidates(), num_nodes=st.integers(-1, 6))
@many
def test_a_chain_is_the_first_candidates_in_a_row(c: Candidates, num_nodes: int) -> None:
    tree = chain_tree(c, num_nodes)
    is_a_tree(tree)
    kept = max(0, min(num_nodes, len(c)))
    assert tree.parents == list(range(kept))
    assert tree.token_ids == [ids[0] for ids in c.token_ids_DC[:kept]]
    assert tree.log_probs == [sum(row[0] for row in c.log_probs_DC[: i + 1]) for i in range(kept)]


def test_what_is_left_of_a_draft_is_what_follows_the_tokens_that_it_foresaw() -> None:
    c = Candidates([[1, 2], [3, 4], [5, 6]], [[-1.0, -2.0], [-0.5, -3.0], [-1.0, -1.5]])
    assert c.first(1) == Candidates([[1, 2]], [[-1.0, -2.0]])
    assert c.after([1]) == Candidates([[3, 4], [5, 6]], [[-0.5, -3.0], [-1.0, -1.5]])
    assert c.first(3) == c.first(9) == c.after([]) == c
    assert [c.after(ids) for ids in ([2], [1, 4], [1, 3, 5], [1, 3, 5, 7])] == [None] * 4
    # With pairs the walk is 1, 4, 6: after 4 the guess of the last row is another than after 3.
    pairs = [[], [[-3.0, -0.1], [-0.1, -3.0]], [[-0.2, -2.0], [-2.5, -0.3]]]
    c = replace(c, pairs_DPC=pairs)
    assert chain_tree(c, 3).token_ids == [1, 4, 6]
    assert c.after([1, 3]) is None
    left = c.after([1, 4])
    assert left == Candidates([[5, 6]], [[-2.5, -0.3]], [pairs[2]])
    assert chain_tree(left, 3).token_ids == [6]
    assert best_first_tree(left, 3).token_ids == [6, 5]
    assert c.first(2).pairs_DPC == pairs[:2]


@many
@given(c=candidates_with_pairs(), num_nodes=st.integers(0, 6))
def test_a_chain_with_pairs_goes_from_best_child_to_best_child(c: Candidates, num_nodes: int) -> None:
    rank, total, expected = 0, 0.0, []
    for d in range(min(num_nodes, len(c))):
        row = c.log_probs_DC[0] if d == 0 else c.pairs_DPC[d][rank]  # type: ignore[index]
        rank = row.index(max(row))
        total += row[rank]
        expected.append((c.token_ids_DC[d][rank], total))
    tree = chain_tree(c, num_nodes)
    is_a_tree(tree)
    assert list(zip(tree.token_ids, tree.log_probs, strict=True)) == expected


@many
@given(c=candidates(), budget=st.integers(0, 20))
def test_a_rows_tokens_are_its_nodes_from_the_root_on(c: Candidates, budget: int) -> None:
    tree = best_first_tree(c, budget)
    assert [tuple(path) for path in tree.paths_of_tokens()] == [(), *token_paths(tree)]


@many
@given(c=candidates(max_depth=3, max_width=3), budget=st.integers(0, 12))
def test_the_end_of_the_path_has_the_law_of_the_draft(c: Candidates, budget: int) -> None:
    """Against enumeration: the AR view draws each position from the draft's own distribution, and walks the tree."""
    shares = [[exp(x) for x in row] for row in c.log_probs_DC]
    c = Candidates(c.token_ids_DC, [[log(p / (sum(row) + 0.1)) for p in row] for row in shares])
    tree = best_first_tree(c, budget)
    ends = [0.0] * (tree.num_nodes + 1)
    children = tree.children()
    for ranks in product(*[range(len(row) + 1) for row in c.log_probs_DC]):
        mass, row = 1.0, 0
        walking = True
        for d, rank in enumerate(ranks):
            known = rank < len(c.log_probs_DC[d])
            mass *= exp(c.log_probs_DC[d][rank]) if known else 1.0 - sum(map(exp, c.log_probs_DC[d]))
            walking = walking and known and c.token_ids_DC[d][rank] in children[row]
            row = children[row][c.token_ids_DC[d][rank]] if walking else row
        ends[row] += mass
    assert tree.end_probs() == pytest.approx(ends, abs=1e-9)


def test_end_probs_are_never_negative() -> None:
    # Rounding may leave the children with a little more than their parent has.
    assert DraftTree([1, 2], [0, 0], [log(0.7), log(0.3) + 1e-9]).end_probs()[0] == 0.0
    assert EMPTY_TREE.end_probs() == [1.0]


def walk(tree: DraftTree, ar_ids: list[int]) -> list[int]:
    """By the children map, one step after another."""
    rows, children = [0], tree.children()
    while (row := children[rows[-1]].get(ar_ids[rows[-1]])) is not None:
        rows.append(row)
    return rows[1:]


@many
@given(data=st.data(), budget=st.integers(0, 12))
def test_the_accepted_rows_are_the_walk_that_the_ar_view_takes(data: Any, budget: int) -> None:
    """Two tokens to choose from at each position, so that paths of every length are common."""
    c = data.draw(candidates(max_width=2))
    tree = best_first_tree(c, budget)
    tokens = st.sampled_from([t for ids in c.token_ids_DC for t in ids] or [0])
    ar_ids = [
        data.draw(st.sampled_from(sorted(kids)) | tokens if kids else tokens) for kids in tree.children()
    ]
    rows = accepted_rows(tree, ar_ids)
    assert rows == walk(tree, ar_ids)
    assert all(tree.parents[row - 1] == before for before, row in pairwise([0, *rows]))


def test_accepted_rows_skip_branches_that_the_ar_view_did_not_take() -> None:
    #      0 -> 1 (token 7) -> 3 (token 8)      and 0 -> 2 (token 5) -> 4 (token 8) -> 5 (token 9)
    tree = DraftTree([7, 5, 8, 8, 9], [0, 0, 1, 2, 4], [0.0] * 5)
    assert accepted_rows(tree, [5, 8, 8, 0, 9, 0]) == [2, 4, 5]
    assert accepted_rows(tree, [5, 8, 8, 0, 6, 0]) == [2, 4]
    assert accepted_rows(tree, [7, 9, 8, 0, 9, 0]) == [1]
    assert accepted_rows(tree, [6, 8, 8, 0, 9, 0]) == []


def test_rejected_is_what_the_draft_would_have_written_on() -> None:
    tree = DraftTree([7, 5, 8, 8, 9, 6], [0, 0, 1, 2, 4, 3], [0.0] * 6)
    assert rejected_ids(tree, []) == [7, 8, 6]
    assert rejected_ids(tree, [1]) == [8, 6]
    assert rejected_ids(tree, [2, 4]) == [9]
    assert rejected_ids(tree, [2, 4, 5]) == []


@pytest.mark.parametrize("tree", [EMPTY_TREE, best_first_tree(Candidates([], []), 5)])
def test_an_empty_tree_is_the_anchor_alone(tree: DraftTree) -> None:
    is_a_tree(tree)
    assert tree.num_nodes == 0
    assert tree.paths() == [[]]
    assert accepted_rows(tree, [3]) == []
