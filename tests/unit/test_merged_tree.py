"""Trees of several sources against brute force: every path, its chance by the rule, and who proposed it."""

from math import exp, log
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus.decoding.tree import (
    Candidates,
    MergedTree,
    Source,
    best_first_tree,
    merged_tree,
)

many = settings(max_examples=200, deadline=None, derandomize=True)
CHANCES = st.sampled_from([0.0, 0.05, 0.2, 0.4, 0.7, 1.0])


def log_of(chance: float) -> float:
    return log(chance) if chance else float("-inf")


@st.composite
def sources(draw: Any) -> Source:
    """Tokens from a few, so that sources agree and differ; with and without tables of pairs; or a chain."""
    depth = draw(st.integers(0, 3))
    if draw(st.booleans()):
        token_ids = draw(st.lists(st.integers(0, 3), min_size=depth, max_size=depth))
        if draw(st.integers(0, 3)) == 0:
            return Source.chain(token_ids)
        return Source.chain(token_ids, [log_of(draw(CHANCES)) for _ in token_ids])
    width = draw(st.integers(1, 3))
    token_ids_DC = [draw(st.permutations(range(4)))[:width] for _ in range(depth)]
    row = st.lists(CHANCES.map(log_of), min_size=width, max_size=width)
    table = st.lists(row, min_size=width, max_size=width)
    pairs = [[], *(draw(table) for _ in range(1, depth))] if depth and draw(st.booleans()) else None
    return Source(Candidates(token_ids_DC, [draw(row) for _ in range(depth)], pairs))


Path = tuple[int, ...]


def every_path(given: list[Source]) -> dict[Path, tuple[float, int]]:
    """{path: (chance, origins)} of all that have a chance."""
    found: dict[Path, tuple[float, int]] = {}

    def go(path: Path, chance: float, ranks: dict[int, int]) -> None:
        proposed: dict[int, dict[int, tuple[int, float]]] = {}
        for index, rank in ranks.items():
            candidates = given[index].candidates
            if len(path) < len(candidates):
                for own, log_prob in enumerate(candidates.log_probs(len(path), rank)):
                    if exp(log_prob) > 0:
                        token_id = candidates.token_ids_DC[len(path)][own]
                        proposed.setdefault(token_id, {})[index] = own, exp(log_prob)
        if sure := {t for t, by in proposed.items() if any(given[index].is_certain for index in by)}:
            proposed = {t: by for t, by in proposed.items() if t in sure}
        chances = {}
        for token_id, by in proposed.items():
            miss = 1.0
            for _, p in by.values():
                miss *= 1 - p
            chances[token_id] = 1 - miss
        # What one source says of a place is taken as it is.
        share = max(1.0, sum(chances.values())) if len(ranks) > 1 else 1.0
        for token_id, by in proposed.items():
            longer = (*path, token_id)
            reached = chance * chances[token_id] / share
            found[longer] = reached, sum(1 << index for index in by)
            go(longer, reached, {index: own for index, (own, _) in by.items()})

    go((), 1.0, dict.fromkeys(range(len(given)), 0))
    return found


def paths_of(merged: MergedTree) -> list[Path]:
    return [tuple(path) for path in merged.tree.paths_of_tokens()[1:]]


@many
@given(given_sources=st.lists(sources(), max_size=3), budget=st.integers(-1, 30))
def test_the_nodes_are_the_most_probable_paths_of_all_sources(
    given_sources: list[Source], budget: int
) -> None:
    merged, expected = merged_tree(given_sources, budget), every_path(given_sources)
    paths = paths_of(merged)
    assert len(paths) == len(set(paths)) == len(merged.origins) == min(max(0, budget), len(expected))
    assert all(0 <= parent < row for row, parent in enumerate(merged.tree.parents, start=1))
    for path, log_prob, origins in zip(paths, merged.tree.log_probs, merged.origins, strict=True):
        assert exp(log_prob) == pytest.approx(expected[path][0])
        assert origins == expected[path][1]
    best = sorted((chance for chance, _ in expected.values()), reverse=True)[: max(0, budget)]
    assert [exp(log_prob) for log_prob in merged.tree.log_probs] == pytest.approx(best)


@many
@given(source=sources(), empty=st.booleans(), budget=st.integers(0, 20))
def test_one_source_gives_its_own_tree(source: Source, empty: bool, budget: int) -> None:
    tree = best_first_tree(source.candidates, budget)
    assert merged_tree([source], budget) == MergedTree(tree, [1] * tree.num_nodes)


@many
@given(given_sources=st.lists(sources(), min_size=1, max_size=3), data=st.data())
def test_what_is_not_allowed_goes_with_all_that_hangs_on_it(given_sources: list[Source], data: Any) -> None:
    merged = merged_tree(given_sources, 15)
    n = merged.tree.num_nodes
    allowed = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    kept, rows = merged.kept(allowed)
    paths = paths_of(merged)
    stays = [all(allowed[paths.index(path[: i + 1])] for i in range(len(path))) for path in paths]
    assert rows == [0, *(row for row in range(1, n + 1) if stays[row - 1])]
    assert paths_of(kept) == [path for path, stay in zip(paths, stays, strict=True) if stay]
    assert kept.origins == [merged.origins[row - 1] for row in rows[1:]]
    assert kept.tree.log_probs == [merged.tree.log_probs[row - 1] for row in rows[1:]]
    assert merged.kept([True] * n) == (merged, list(range(n + 1)))


def test_a_view_and_a_copy_that_agree_are_believed_more() -> None:
    view = Source(Candidates([[5, 6], [7, 8]], [[log(0.5), log(0.3)], [log(0.6), log(0.2)]]))
    copy = Source.chain([5, 9], [log(0.6), log(0.7)])
    merged = merged_tree([view, copy], 3)
    assert paths_of(merged) == [(5,), (5, 9), (5, 7)]
    assert merged.origins == [0b11, 0b10, 0b01]
    # 5: 1 - 0.5 x 0.4, of 0.8 + 0.3; then 0.7, 0.6 and 0.2 of 1.5.
    first = 0.8 / 1.1
    assert [exp(p) for p in merged.tree.log_probs] == pytest.approx([first, first * 0.7 / 1.5, first * 0.4])


def test_what_a_grammar_forces_leaves_no_room_for_others() -> None:
    view = Source(Candidates([[5, 6], [7, 8], [1, 2]], [[log(0.5), log(0.3)]] * 3))
    merged = merged_tree([view, Source.chain([6, 9])], 9)
    assert paths_of(merged) == [(6,), (6, 9)]
    assert merged.origins == [0b11, 0b10]
    assert merged.tree.log_probs == [0.0, 0.0]
    # Behind the forced tokens the view goes on where it proposed them.
    merged = merged_tree([view, Source.chain([6])], 3)
    assert paths_of(merged) == [(6,), (6, 7), (6, 8)]
