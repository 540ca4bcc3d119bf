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
from typing import Literal

MEMORY = 0.85
"""Weight of the past in a moving average, for each new observation."""
MARGIN = 1.05
"""Drafting must promise this much more than plain decoding before it is taken up or kept."""
PATIENCE, MAX_PATIENCE = 24, 192
"""Plain tokens before drafting gets another chance; doubled whenever the chance was wasted."""
LATE_SHARE, FORGIVENESS = 0.6, 0.03
"""What late drafts are worth beside fresh ones while none is tried, and how fast that is returned to."""

Left = Literal["fresh", "late", "none"]
"""The draft that a verification leaves: of a block where the path ended, of one further back, or none."""


@dataclass(frozen=True, slots=True)
class CostTable:
    """Milliseconds of a pass by its rows: `body_ms` of AR rows, and `head_ms` of projecting as many.

    What block rows add is told apart, since they read weights of their own: `block_ms`, by `block_rows`,
    beside a few AR rows, and `draft_ms` of making a draft of as many rows. Rows ascend; between the entries
    costs are interpolated, beyond the last one extrapolated.
    """

    rows: tuple[int, ...]
    body_ms: tuple[float, ...]
    head_ms: tuple[float, ...]
    draft_ms: tuple[float, ...]
    block_rows: tuple[int, ...]
    block_ms: tuple[float, ...]

    def __call__(self, num_ar: int, num_block: int = 0, num_projected: int = 0) -> float:
        """A pass of AR rows, all projected, and block rows, of which `num_projected` are."""
        cost = _at(self.rows, self.body_ms, num_ar) + _at(self.rows, self.head_ms, num_ar + num_projected)
        return cost + (_at(self.block_rows, self.block_ms, num_block) if num_block else 0.0)

    def draft(self, num_rows: int) -> float:
        """Making a draft of projected rows."""
        return _at(self.rows, self.draft_ms, num_rows)


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
    verification, for fresh drafts and for late ones, whose block had not seen all of the text; nodes that it
    took; by number of blocks, how often the text went on exactly where one of them stood; and how often a
    late draft was left where it did not.
    """

    costs: CostTable
    block_size: int
    max_nodes: int
    max_blocks: int
    _fresh: _Average = field(default_factory=lambda: _Average(1.5))
    _late: _Average = field(default_factory=lambda: _Average(1.0))
    _left: _Average = field(default_factory=lambda: _Average(0.9))
    _nodes: _Average = field(init=False)
    _hits: list[_Average] = field(init=False)
    _trust: _Average = field(default_factory=lambda: _Average(1.0))
    _block_trust: _Average = field(default_factory=lambda: _Average(1.0))
    _plain_tokens: int = 0
    _patience: int = PATIENCE

    def __post_init__(self) -> None:
        self._nodes = _Average(float(self.block_size))
        self._hits = [_Average(1.0 - 0.8**m) for m in range(self.max_blocks + 1)]

    @property
    def plain_rate(self) -> float:
        """Tokens a millisecond of plain decoding."""
        return 1.0 / self.costs(1)

    def pass_ms(self, num_nodes: int, num_blocks: int) -> float:
        """A verification with blocks beside it; without nodes, a draft pass."""
        num_guesses = num_blocks * (self.block_size - 2)
        return self.costs(1 + num_nodes, num_blocks * self.block_size, num_guesses)

    @property
    def draft_ms(self) -> float:
        """Making a draft of a block: all but two of its rows guess."""
        return self.costs.draft(self.block_size - 2)

    def draft_rate(self) -> float:
        """Tokens a millisecond of drafting and verifying, with the number of blocks that makes most of it."""
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

    def keeps_late(self) -> bool:
        """Whether a late draft is worth verifying, rather than making a new one."""
        return self._worth(late=True) > 0.0

    def num_blocks(self, num_nodes: int, end_probs: Sequence[float]) -> int:
        """How many blocks to add, given each row's chance to be where the path ends.

        While late drafts are worth keeping the first block stands at the root: it lies on every path, and so
        leaves one. The others stand where the path most likely ends.
        """
        rate, fresh = self.rate(), self._worth(late=False)
        late = self._left.value * max(self._worth(late=True), 0.0)
        root = 1 if self.keeps_late() else 0
        chances = [*end_probs[:root], *sorted(end_probs[root:], reverse=True)][: self.max_blocks]
        hits = accumulate(self._block_trust.value * chance for chance in chances)
        values = [-rate * self.pass_ms(num_nodes, 0)]
        for num_blocks, hit in enumerate(hits, start=1):
            hit = min(hit, 1.0)
            values.append(hit * fresh + (1.0 - hit) * late - rate * self.pass_ms(num_nodes, num_blocks))
        return _best(values)

    def observe(
        self,
        log_probs: Sequence[float],
        num_accepted: int,
        block_probs: Sequence[float],
        *,
        late: bool,
        left: Left,
    ) -> None:
        """Take note of a verification: its nodes, how many stood, and whether their draft was a late one; the
        chances that the path would end at its blocks, and what draft it left."""
        expected = sum(exp(log_prob) for log_prob in log_probs)
        if expected > 0.05:
            self._trust.add(min(num_accepted / expected, 3.0))
        if block_probs:
            hit = float(left == "fresh")
            self._block_trust.add(min(hit / max(sum(block_probs), 0.05), 3.0))
            self._hits[len(block_probs)].add(hit)
            if not hit and self.keeps_late():
                self._left.add(float(left == "late"))
        if late:
            self._late.add(num_accepted)
        else:
            self._fresh.add(num_accepted)
            if not self.keeps_late():
                # One bad late draft must not be the last: untried, they slowly count for more again.
                self._late.value += FORGIVENESS * (LATE_SHARE * self._fresh.value - self._late.value)
        self._nodes.add(len(log_probs))
        if self._plain_tokens >= self._patience:
            worth = self.draft_rate() > MARGIN * self.plain_rate
            self._patience = PATIENCE if worth else min(2 * self._patience, MAX_PATIENCE)
        self._plain_tokens = 0

    def _worth(self, *, late: bool) -> float:
        """Tokens that a draft at hand is worth: it saves the draft pass, but also the one token which that
        would have decided, and fewer drafts stand of a late one."""
        saved = self.rate() * self.pass_ms(0, 1) - 1.0
        return saved - (self._fresh.value - self._late_accepted if late else 0.0)

    @property
    def _late_accepted(self) -> float:
        # What was seen of late drafts may be long ago; they are no better than fresh ones.
        return min(self._late.value, self._fresh.value)

    def _steady_rate(self, num_blocks: int) -> float:
        """A verification with so many blocks, and a draft pass where it leaves nothing."""
        fresh = self._fresh.value
        verify_ms = self.pass_ms(round(self._nodes.value), num_blocks) + self.draft_ms
        if not num_blocks:
            return (2.0 + fresh) / (self.pass_ms(0, 1) + verify_ms)
        hit = self._hits[num_blocks].value
        late = (1.0 - hit) * self._left.value
        nothing = 1.0 - hit - late
        tokens = 1.0 + (hit + nothing) * fresh + late * self._late_accepted + nothing
        return tokens / (verify_ms + nothing * self.pass_ms(0, 1))


def _at(rows: tuple[int, ...], values: tuple[float, ...], num_rows: int) -> float:
    i = min(max(bisect_left(rows, num_rows), 1), len(rows) - 1)
    (x0, x1), (y0, y1) = rows[i - 1 : i + 1], values[i - 1 : i + 1]
    return max(y0 + (y1 - y0) * (num_rows - x0) / (x1 - x0), 0.0)


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
