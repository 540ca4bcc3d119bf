"""Which passes are worth their time: plain steps, drafts, how many nodes, how many blocks beside them.

All values are in tokens: a pass is worth the tokens it is expected to commit, less what its time would have
brought at the best rate known (the renewal-reward rule). Expectations are the draft's own probabilities,
corrected by how they fared so far in this request; times come from a table measured once on the machine, so
the decisions repeat. None of them can change the text: every token is the AR view's own choice.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import exp

MEMORY = 0.85
"""Weight of the past in a moving average, for each new observation."""
MARGIN = 1.05
"""Drafting must promise this much more than plain decoding before it is taken up or kept."""
PATIENCE, MAX_PATIENCE = 24, 192
"""Plain tokens before drafting gets another chance; doubled whenever the chance was wasted."""


@dataclass(frozen=True, slots=True)
class CostTable:
    """Milliseconds of a pass by its rows: `body_ms` of AR rows, and `head_ms` of projecting as many.

    What block rows add is told apart, since they read weights of their own: `block_ms`, by `block_rows`,
    beside a few AR rows, and `draft_head_ms` of projecting them. Rows ascend; between the entries costs are
    interpolated, beyond the last one extrapolated.
    """

    rows: tuple[int, ...]
    body_ms: tuple[float, ...]
    head_ms: tuple[float, ...]
    draft_head_ms: tuple[float, ...]
    block_rows: tuple[int, ...]
    block_ms: tuple[float, ...]

    def __call__(self, num_ar: int, num_block: int = 0, num_projected: int = 0) -> float:
        """A pass of AR rows, all projected, and block rows, of which `num_projected` are."""
        cost = _at(self.rows, self.body_ms, num_ar) + _at(self.rows, self.head_ms, num_ar)
        if num_block:
            cost += _at(self.block_rows, self.block_ms, num_block)
        return cost + (self.head(num_projected) if num_projected else 0.0)

    def head(self, num_rows: int) -> float:
        """Projecting a draft's rows to the vocabulary."""
        return _at(self.rows, self.draft_head_ms, num_rows)


@dataclass(slots=True)
class _Average:
    """A moving average; what it starts with counts as one observation, so the first ones weigh more."""

    value: float
    num_observed: int = 1

    def add(self, observed: float) -> None:
        self.num_observed += 1
        weight = max(1 - MEMORY, 1 / self.num_observed)
        self.value += weight * (observed - self.value)


@dataclass(slots=True)
class Policy:
    """The decisions of one request, for block size `block_size` with the AR row in the draft pass.

    max_nodes and max_blocks bound what a pass may carry. Averages over the request: drafts that stood at a
    verification, nodes that it took, and, by number of blocks, how often one of them became the next draft.
    """

    costs: CostTable
    block_size: int
    max_nodes: int
    max_blocks: int
    _accepted: _Average = field(default_factory=lambda: _Average(1.5))
    _nodes: _Average = field(init=False)
    _kept: list[_Average] = field(init=False)
    _trust: _Average = field(default_factory=lambda: _Average(1.0))
    _block_trust: _Average = field(default_factory=lambda: _Average(1.0))
    _plain_tokens: int = 0
    _patience: int = PATIENCE

    def __post_init__(self) -> None:
        self._nodes = _Average(float(self.block_size))
        self._kept = [_Average(1.0 - 0.65**m) for m in range(self.max_blocks + 1)]

    @property
    def plain_rate(self) -> float:
        """Tokens a millisecond of plain decoding."""
        return 1.0 / self.costs(1)

    @property
    def draft_ms(self) -> float:
        """A draft pass: the anchor as AR row, and a block of which all but two rows are projected."""
        return self.costs(1, self.block_size, self.block_size - 2)

    def draft_rate(self) -> float:
        """Tokens a millisecond of drafting, verifying, and going on while verifications leave a draft: with
        the number of blocks that makes most of it."""
        return max(self._steady_rate(m) for m in range(self.max_blocks + 1))

    def rate(self) -> float:
        """The best rate known: what a millisecond is worth."""
        return max(self.plain_rate, self.draft_rate())

    def wants_draft(self) -> bool:
        """Whether a draft pass is to be made now, where there is no draft."""
        if self.draft_rate() > MARGIN * self.plain_rate or self._plain_tokens >= self._patience:
            return True
        self._plain_tokens += 1
        return False

    def num_nodes(self, log_probs: Sequence[float]) -> int:
        """How many nodes of a best-first tree to verify, given all nodes' path log probs in its order."""
        rate = self.rate()
        gains = accumulate((self._trust.value * exp(log_prob) for log_prob in log_probs), initial=0.0)
        return _best([gain - rate * self.costs(1 + n) for n, gain in enumerate(gains)])

    def num_blocks(self, num_nodes: int, end_probs: Sequence[float]) -> int:
        """How many blocks to add, at the rows where the path most likely ends, given these chances."""
        rate, projected = self.rate(), self.block_size - 2
        # A draft at hand saves the draft pass, but also the one token which that would have decided.
        saved = rate * (self.draft_ms - self.costs.head(projected)) - 1.0
        chances = sorted(end_probs, reverse=True)[: self.max_blocks]
        hits = accumulate((self._block_trust.value * chance for chance in chances), initial=0.0)
        return _best(
            [
                hit * saved - rate * self.costs(1 + num_nodes, m * self.block_size)
                for m, hit in enumerate(hits)
            ]
        )

    def observe(
        self, log_probs: Sequence[float], num_accepted: int, block_probs: Sequence[float], kept: bool
    ) -> None:
        """Take note of a verification: its nodes, how many stood, the chances that its blocks had to be met,
        and whether one of them became the next draft."""
        expected = sum(exp(log_prob) for log_prob in log_probs)
        if expected > 0.05:
            self._trust.add(min(num_accepted / expected, 3.0))
        if block_probs:
            self._block_trust.add(min(float(kept) / max(sum(block_probs), 0.05), 3.0))
            self._kept[len(block_probs)].add(float(kept))
        self._accepted.add(num_accepted)
        self._nodes.add(len(log_probs))
        if self._plain_tokens >= self._patience:
            worth = self.draft_rate() > MARGIN * self.plain_rate
            self._patience = PATIENCE if worth else min(2 * self._patience, MAX_PATIENCE)
        self._plain_tokens = 0

    def _steady_rate(self, num_blocks: int) -> float:
        num_verified = 1.0 / (1.0 - min(self._kept[num_blocks].value, 0.95))
        verify_ms = self.costs(1 + round(self._nodes.value), num_blocks * self.block_size)
        if num_blocks:
            verify_ms += self._kept[num_blocks].value * self.costs.head(self.block_size - 2)
        tokens = 1.0 + num_verified * (1.0 + self._accepted.value)
        return tokens / (self.draft_ms + num_verified * verify_ms)


def _at(rows: tuple[int, ...], values: tuple[float, ...], num_rows: int) -> float:
    i = min(max(bisect_left(rows, num_rows), 1), len(rows) - 1)
    (x0, x1), (y0, y1) = rows[i - 1 : i + 1], values[i - 1 : i + 1]
    return max(y0 + (y1 - y0) * (num_rows - x0) / (x1 - x0), 0.0)


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
