"""How many tokens a block should guess: what drafts promised, by the length of their block."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from orthrus.decoding.average import Average

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Tokens that blocks may guess, where they can guess more."""
GOES_ON, NUM_PROMISED = 0.7, 2
"""Before a request has drafted: the chance that a guess stands where those before it did, for a view that does not
know its own, and how many drafts that counts for."""
STRAYS = 0.1
"""How far the estimate for blocks longer than a draft's own returns to the first expectation, per draft."""


class Offer(NamedTuple):
    """Accepted drafts that a draft promises, with as many nodes as are worth their time (on average)."""

    promised: float
    num_nodes: float


@dataclass(slots=True)
class BlockLength:
    """Blocks of one length: what their drafts promise, with as many nodes as drafting would verify."""

    num_guesses: int
    promised: Average
    num_nodes: Average

    @property
    def rows(self) -> int:
        """Those that guess, and the first, whose guess the AR row at the anchor decides."""
        return 1 + self.num_guesses


def block_lengths(
    most_guesses: int, lengths: Sequence[int], goes_on: float | None = None
) -> list[BlockLength]:
    """The lengths to choose from, shortest first, with what is expected of them at first."""
    sizes = [n for n in lengths if n < most_guesses]
    return [
        BlockLength(n, Average(first_expected(n, goes_on), NUM_PROMISED), Average(1.0 + n))
        for n in (*sizes, most_guesses)
    ]


def learn(lengths: Sequence[BlockLength], offers: Sequence[Offer], goes_on: float | None = None) -> None:
    """Take note of what a fresh draft offered; offers: by length, shortest first, up to the draft's own.

    Longer blocks are expected to go on as they used to beyond the same depth. What is not tried slowly returns
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
    """Accepted drafts of a block, before one was made. goes_on: the view's own chance, None where it knows none."""
    chance = GOES_ON if goes_on is None else goes_on
    return sum(chance**i for i in range(1, num_guesses + 1))
