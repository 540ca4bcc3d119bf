"""Copies against a search from the start of the text."""

from collections.abc import Iterable
from itertools import pairwise
from math import exp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus.decoding.copies import (
    MATCH_LENGTHS,
    MOST_DEPTHS,
    NO_COPY,
    PRIOR_CHANCES,
    Copy,
    CopyIndex,
    CopyPromise,
)

many = settings(max_examples=400, deadline=None, derandomize=True)
# Few different tokens, so that everything repeats.
TEXT = st.lists(st.integers(0, 2), max_size=30)


def searched(text: list[int], path: list[int], num_tokens: int, lengths: Iterable[int]) -> Copy:
    """Every earlier place, the latest first; it ends inside the text, before the last token of all."""
    whole = [*text, *path]
    for length in sorted(lengths, reverse=True):
        for end in range(min(len(text), len(whole) - 1), length - 1, -1):
            if len(whole) >= length and whole[end - length : end] == whole[len(whole) - length :]:
                return Copy(tuple(whole[end : end + num_tokens]), length)
    return NO_COPY


@many
@given(
    text=TEXT,
    cuts=st.lists(st.integers(0, 30), max_size=4),
    path=st.lists(st.integers(0, 2), max_size=6),
    num_tokens=st.integers(0, 6),
    lengths=st.sets(st.integers(1, 6), min_size=1),
)
def test_a_copy_is_what_a_search_finds(
    text: list[int], cuts: list[int], path: list[int], num_tokens: int, lengths: set[int]
) -> None:
    """However the text comes in; and asking changes nothing."""
    index = CopyIndex(list(lengths))
    places = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    for start, end in pairwise(places):
        index.extend(text[start:end])
        known = text[:end]
        assert index.continuation(num_tokens) == searched(known, [], num_tokens, lengths)
        assert index.after(path, num_tokens) == searched(known, path, num_tokens, lengths)
        assert index.after(tuple(path), num_tokens) == index.after(path, num_tokens)
        assert index.continuation(num_tokens) == searched(known, [], num_tokens, lengths)
    assert len(index) == len(text)


def test_the_longest_match_counts_then_the_latest() -> None:
    index = CopyIndex()
    index.extend([1, 2, 3, 4, 7, 1, 2, 3, 9, 2, 3, 8, 5, 2, 3])
    assert index.continuation(2) == Copy((8, 5), 2)
    index.extend([6, 1, 2, 3])
    assert index.continuation(3) == Copy((9, 2, 3), 3)
    assert index.after([4], 2) == Copy((7, 1), 4)
    assert index.after([4, 4], 2) == NO_COPY
    index.extend([4, 7, 1, 2, 3])
    assert index.continuation(1) == Copy((9,), 8)
    assert CopyIndex().continuation(5) == NO_COPY


def test_promises_start_at_the_priors_and_follow_acceptance() -> None:
    promise = CopyPromise()
    assert [promise.chance(n, 1) for n in MATCH_LENGTHS] == pytest.approx(
        [PRIOR_CHANCES[n][0] for n in MATCH_LENGTHS]
    )
    copy = Copy((5, 6, 7, 8, 9, 1), 3)
    assert [exp(p) for p in promise.log_probs(copy)] == pytest.approx(
        [*PRIOR_CHANCES[3], *PRIOR_CHANCES[3][-1:] * 2]
    )
    for _ in range(200):
        # The first two are always accepted, the third never is.
        promise.observe(3, 2, 6)
    chances = [exp(p) for p in promise.log_probs(copy)]
    assert chances[0] > 0.9
    assert chances[1] > 0.9
    assert chances[2] < 0.2
    assert all(0 < chance < 1 for chance in chances)
    assert promise.chance(2, 1) == pytest.approx(PRIOR_CHANCES[2][0])
    # Old news fades.
    for _ in range(200):
        promise.observe(3, 0, 1)
    assert promise.chance(3, 1) < 0.15
    assert promise.chance(3, MOST_DEPTHS + 5) == promise.chance(3, MOST_DEPTHS)


def test_nothing_is_learnt_from_what_was_not_judged() -> None:
    promise = CopyPromise()
    promise.observe(2, 0, 0)
    assert promise == CopyPromise()
    promise.observe(2, 2, 2)
    assert promise.chance(2, 1) > PRIOR_CHANCES[2][0]
    with pytest.raises(AssertionError):
        promise.observe(2, 3, 2)
