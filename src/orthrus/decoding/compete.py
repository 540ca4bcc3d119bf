"""Divides the rows of a pass among the nodes of several requests, at one price."""

from collections.abc import Callable, Sequence
from itertools import accumulate


def num_winners(
    chances: Sequence[Sequence[float]], added_ms: Callable[[int], float], rate: float
) -> list[int]:
    """How many nodes of each request a pass should verify, so that together they give the most tokens for its time.

    chances: acceptance probabilities of each request's nodes, in descending order. added_ms: the time that so many
    rows add to the pass. rate: tokens that a millisecond is worth.
    """
    ranked = sorted(((p, i) for i, falling in enumerate(chances) for p in falling), reverse=True)
    promised = accumulate((p for p, _ in ranked), initial=0.0)
    values = [tokens - rate * added_ms(num) for num, tokens in enumerate(promised)]
    winners = [0] * len(chances)
    for _, i in ranked[: max(range(len(values)), key=values.__getitem__)]:
        winners[i] += 1
    return winners
