"""Estimates how many accepted drafts blocks of each length promise, to choose how many tokens a block guesses."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from orthrus.decoding.average import Average

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Possible numbers of guesses in a block, below the largest that the view allows."""
GOES_ON, NUM_PROMISED = 0.7, 2
"""GOES_ON: the first estimate of the probability that a guess is accepted if those before it were, for a view that does
not store its own. NUM_PROMISED: the number of proposals that this estimate counts for.
"""
STRAYS = 0.1
"""The share by which each proposal moves the estimate for longer blocks than its own back to the first expectation."""


class Offer(NamedTuple):
    """The expected accepted drafts of a proposal, if only the nodes that are worth their time are verified.

    num_nodes: how many these are; an average in `BlockLength`.
    """

    promised: float
    num_nodes: float


@dataclass(slots=True)
class BlockLength:
    """Blocks of one length: the accepted drafts that they promise, with as many nodes as drafting would verify."""

    num_guesses: int
    promised: Average
    num_nodes: Average

    @property
    def rows(self) -> int:
        """Rows of a block: its guesses, and the first row, whose token the AR row at the anchor decides."""
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
    """Update the lengths with the offers of a fresh proposal.

    offers: by length, shortest first, up to the proposal's own length. For longer blocks, the gain beyond the
    proposal's depth is estimated from their earlier averages. The estimate of a length that is not tried slowly returns
    to the first expectation.
    """
    before = here = Offer(0.0, 0)
    known = [(0.0, 0.0), (0.0, 0.0), *((n.promised.value, n.num_nodes.value) for n in lengths)]
    first = [0.0, 0.0, *(first_expected(n.num_guesses, goes_on) for n in lengths)]
    for i, length in enumerate(lengths):
        if i < len(offers):
            offer = offers[i]
        else:
            (p0, _), (p1, n1), (p2, n2) = known[i : i + 3]
            # A view whose guesses were never accepted expects nothing of any length.
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
    """Expected accepted drafts of a block before any observation.

    goes_on: the view's own probability that a guess is accepted if those before it were, None if it stores none.
    """
    prob = GOES_ON if goes_on is None else goes_on
    return sum(prob**i for i in range(1, num_guesses + 1))
