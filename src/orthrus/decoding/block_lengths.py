"""How many tokens a block should guess, from what earlier drafts promised, by the length of their block."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from orthrus.decoding.average import Average

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Possible numbers of guesses in a block, below the largest that the view allows."""
GOES_ON, NUM_PROMISED = 0.7, 2
"""Values before a request has drafted: the chance that a guess is accepted if those before it were, for a view
that does not store its own, and the number of drafts that this first estimate counts for.
"""
STRAYS = 0.1
"""The share by which the estimate for blocks longer than a draft's own returns to the first expectation, per draft."""


class Offer(NamedTuple):
    """Expected number of accepted drafts of a draft, with as many nodes as are worth their time (on average)."""

    promised: float
    num_nodes: float


@dataclass(slots=True)
class BlockLength:
    """Blocks of one length: what their drafts promise, with as many nodes as regular drafting would verify."""

    num_guesses: int
    promised: Average
    num_nodes: Average

    @property
    def rows(self) -> int:
        """Rows that guess, and the first row, whose guess the AR row at the anchor decides."""
        return 1 + self.num_guesses


def block_lengths(
    most_guesses: int, lengths: Sequence[int], goes_on: float | None = None
) -> list[BlockLength]:
    """The lengths to choose from, shortest first, with their first expectations."""
    sizes = [n for n in lengths if n < most_guesses]
    return [
        BlockLength(n, Average(first_expected(n, goes_on), NUM_PROMISED), Average(1.0 + n))
        for n in (*sizes, most_guesses)
    ]


def learn(lengths: Sequence[BlockLength], offers: Sequence[Offer], goes_on: float | None = None) -> None:
    """Update the lengths with what a fresh draft offered. offers: by length, shortest first, up to the draft's own.

    For longer blocks, the gain beyond the draft's depth is estimated from their earlier averages. The estimate of
    a length that is not tried slowly returns to the first expectation.
    """
    before = here = Offer(0.0, 0)
    known = [(0.0, 0.0), (0.0, 0.0), *((n.promised.value, n.num_nodes.value) for n in lengths)]
    first = [0.0, 0.0, *(first_expected(n.num_guesses, goes_on) for n in lengths)]
    for i, length in enumerate(lengths):
        if i < len(offers):
            offer = offers[i]
        else:
            (p0, _), (p1, n1), (p2, n2) = known[i : i + 3]
            # A view whose guesses never stood expects nothing of any length.
            rise = first[i + 1] - first[i]
            usual = (first[i + 2] - first[i + 1]) / rise if rise else 0.0
            rises = max(p2 - p1, 0.0) / (p1 - p0) if p1 > p0 else usual
            rises += STRAYS * (usual - rises)
            more = min(rises * (here.promised - before.promised), length.num_guesses - here.promised)
            offer = Offer(here.promised + more, here.num_nodes + max(n2 - n1, 0.0))
        before, here = here, offer
        length.promised.add(offer.promised)
        length.num_nodes.add(offer.num_nodes)


@cache
def first_expected(num_guesses: int, goes_on: float | None = None) -> float:
    """Expected accepted drafts of a block, before one was made. goes_on: the view's own chance, None if it stores
    none.
    """
    chance = GOES_ON if goes_on is None else goes_on
    return sum(chance**i for i in range(1, num_guesses + 1))
