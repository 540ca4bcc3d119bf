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
PROMISED, NUM_PROMISED, LATE_SHARE = 2.0, 2, 0.6
"""Accepted drafts that a draft is expected to promise before one was made, how many drafts that counts for,
and the part of it that a late one promises: so a request starts by drafting, unless rows are dear."""
TRUSTED = 2.0
"""How many accepted drafts, all of them promised, are taken for granted: a few say little about promises."""

MOST_JOINT = 24
"""Guesses of blocks that are projected together with the AR rows of their pass, before it is known which
block serves: so few rows cost less than reading the head a second time would."""

Left = Literal["fresh", "late", "none"]
"""The draft that a verification leaves: of a block where the path ended, of one further back, or none."""


@dataclass(frozen=True, slots=True)
class CostTable:
    """Milliseconds of a pass by its rows: `body_ms` of AR rows, and `head_ms` of projecting as many.

    What block rows add is told apart, since they read weights of their own: `block_ms`, by `block_rows`,
    beside a few AR rows; `draft_pass_ms` of the pass that most drafts come from, one AR row and one block;
    and `draft_ms` of making a draft of one block. Rows ascend; between the entries costs are interpolated,
    beyond the last one extrapolated.
    """

    rows: tuple[int, ...]
    body_ms: tuple[float, ...]
    head_ms: tuple[float, ...]
    block_rows: tuple[int, ...]
    block_ms: tuple[float, ...]
    draft_pass_ms: float
    draft_ms: float

    def __call__(self, num_ar: int, num_block: int = 0, num_projected: int = 0) -> float:
        """A pass of AR rows, all projected, and block rows, of which `num_projected` are."""
        head_ms = _at(self.rows, self.head_ms, num_ar + num_projected)
        if num_ar == 1 and num_block and num_block == self.block_rows[0]:
            return head_ms + self.draft_pass_ms
        added_ms = _at(self.block_rows, self.block_ms, num_block) if num_block else 0.0
        return head_ms + _at(self.rows, self.body_ms, num_ar) + added_ms


def joint_guesses(num_blocks: int, block_size: int, *, own_head: bool) -> int:
    """How many guesses of a pass's blocks are projected with its AR rows: all or none.

    own_head: drafts have a head of their own, of lower precision or of fewer ids.
    """
    num_guesses = num_blocks * max(0, block_size - 2)
    return 0 if own_head or num_guesses > MOST_JOINT else num_guesses


@dataclass(slots=True)
class _Average:
    """A moving average; what it starts with counts as few observations, so the first ones weigh more."""

    value: float
    num_observed: int = 1

    def add(self, observed: float) -> None:
        self.num_observed += 1
        weight = max(1 - MEMORY, 1 / self.num_observed)
        self.value += weight * (observed - self.value)


@dataclass(slots=True)
class _Ratio:
    """What came true of what was promised, as moving sums that start, and return to, as much of both."""

    came: float = TRUSTED
    promised: float = TRUSTED

    @property
    def value(self) -> float:
        return self.came / self.promised

    def add(self, came: float, promised: float) -> None:
        self.came = MEMORY * self.came + (1 - MEMORY) * TRUSTED + came
        self.promised = MEMORY * self.promised + (1 - MEMORY) * TRUSTED + promised


@dataclass(slots=True)
class Policy:
    """The decisions of one request, for block size `block_size` with the AR row in the draft pass.

    max_nodes and max_blocks bound what a pass may carry. Averages over the request: the accepted drafts that
    a draft promised, fresh or late (its block had not seen all of the text), with as many nodes as drafting
    would verify; that number; how much of the promises came true (what stands alone shows little where little
    is verified); by number of blocks, how often the text went on exactly where one of them stood; and how
    often a late draft was left where it did not.
    """

    costs: CostTable
    block_size: int
    max_nodes: int
    max_blocks: int
    own_head: bool = False
    _fresh: _Average = field(default_factory=lambda: _Average(PROMISED, NUM_PROMISED))
    _late: _Average = field(default_factory=lambda: _Average(LATE_SHARE * PROMISED))
    _left: _Average = field(default_factory=lambda: _Average(0.9))
    _nodes: _Average = field(init=False)
    _hits: list[_Average] = field(init=False)
    _fresh_trust: _Ratio = field(default_factory=_Ratio)
    _late_trust: _Ratio = field(default_factory=_Ratio)
    _offer: tuple[float, int] = (0.0, 0)
    _block_trust: _Average = field(default_factory=lambda: _Average(1.0))
    _plain_tokens: int = 0
    _patience: int = PATIENCE
    _pass_ms: dict[tuple[int, int], float] = field(default_factory=dict)
    _draft_rate: float | None = None

    def __post_init__(self) -> None:
        self._nodes = _Average(float(self.block_size))
        self._hits = [_Average(1.0 - 0.8**m) for m in range(self.max_blocks + 1)]

    @property
    def plain_rate(self) -> float:
        """Tokens a millisecond of plain decoding."""
        return 1.0 / self.pass_ms(0, 0)

    def pass_ms(self, num_nodes: int, num_blocks: int) -> float:
        """A verification with blocks beside it; without nodes a draft pass, without either a plain one."""
        key = num_nodes, num_blocks
        if key not in self._pass_ms:
            num_guesses = joint_guesses(num_blocks, self.block_size, own_head=self.own_head)
            self._pass_ms[key] = self.costs(1 + num_nodes, num_blocks * self.block_size, num_guesses)
        return self._pass_ms[key]

    def draft_rate(self) -> float:
        """Tokens a millisecond of drafting and verifying, with the number of blocks that makes most of it."""
        # Asked many times a cycle, and another one only when something has been learnt.
        if self._draft_rate is None:
            self._draft_rate = max(self._steady_rate(m) for m in range(self.max_blocks + 1))
        return self._draft_rate

    def rate(self) -> float:
        """The best rate known: what a millisecond is worth."""
        return max(self.plain_rate, self.draft_rate())

    def wants_draft(self) -> bool:
        """Whether a draft pass is to be made now, where there is no draft."""
        if self.draft_rate() > MARGIN * self.plain_rate or self._plain_tokens >= self._patience:
            return True
        self._plain_tokens += 1
        return False

    def num_nodes(self, log_probs: Sequence[float], *, late: bool, trying: bool = False) -> int:
        """How many nodes of a best-first tree to verify, given all nodes' path log probs in its order.

        Called before each `observe`, which learns from what it noted. late: the draft is. trying: a draft
        pass was made for them, maybe as a chance only. Then time is worth what drafting makes of it, even
        where plain decoding makes more: a chance that verifies too little would prove nothing.
        """
        promised = list(accumulate((exp(log_prob) for log_prob in log_probs), initial=0.0))
        trust = (self._late_trust if late else self._fresh_trust).value
        expected = [trust * tokens for tokens in promised]
        num_drafting = self._most_worth(expected, self.draft_rate())
        self._offer = promised[num_drafting], num_drafting
        return num_drafting if trying else self._most_worth(expected, self.rate())

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
        verified = sum(exp(log_prob) for log_prob in log_probs)
        if block_probs:
            hit = float(left == "fresh")
            self._block_trust.add(min(hit / max(sum(block_probs), 0.05), 3.0))
            self._hits[len(block_probs)].add(hit)
            if not hit and self.keeps_late():
                self._left.add(float(left == "late"))
        promised, num_nodes = self._offer
        if late:
            self._late.add(promised)
            self._late_trust.add(num_accepted, verified)
        else:
            self._fresh.add(promised)
            self._fresh_trust.add(num_accepted, verified)
            if not self.keeps_late():
                # One bad late draft must not be the last: what is not tried is slowly trusted again.
                self._late_trust.add(0.0, 0.0)
                self._late.value += (1 - MEMORY) * (LATE_SHARE * self._fresh.value - self._late.value)
        self._nodes.add(num_nodes)
        self._draft_rate = None
        if self._plain_tokens >= self._patience:
            worth = self.draft_rate() > MARGIN * self.plain_rate
            self._patience = PATIENCE if worth else min(2 * self._patience, MAX_PATIENCE)
        self._plain_tokens = 0

    def _most_worth(self, expected: Sequence[float], rate: float) -> int:
        """The number of nodes that makes most of its time, where n of them bring expected[n] drafts."""
        return _best([tokens - rate * self.pass_ms(n, 0) for n, tokens in enumerate(expected)])

    def _worth(self, *, late: bool) -> float:
        """Tokens that a draft at hand is worth: it saves the draft pass, but also the one token which that
        would have decided, and fewer drafts stand of a late one."""
        saved = self.rate() * self.pass_ms(0, 1) - 1.0
        return saved - (self._num_fresh - self._num_late if late else 0.0)

    @property
    def _num_fresh(self) -> float:
        """How many drafts of a fresh draft are expected to stand."""
        return self._fresh_trust.value * self._fresh.value

    @property
    def _num_late(self) -> float:
        # What was seen of late drafts may be long ago; they are no better than fresh ones.
        return min(self._late_trust.value * self._late.value, self._num_fresh)

    def _steady_rate(self, num_blocks: int) -> float:
        """A verification with so many blocks, and a draft pass where it leaves nothing."""
        fresh = self._num_fresh
        verify_ms = self.pass_ms(round(self._nodes.value), num_blocks) + self.costs.draft_ms
        if not num_blocks:
            return (2.0 + fresh) / (self.pass_ms(0, 1) + verify_ms)
        hit = self._hits[num_blocks].value
        late = (1.0 - hit) * self._left.value
        nothing = 1.0 - hit - late
        tokens = 1.0 + (hit + nothing) * fresh + late * self._num_late + nothing
        return tokens / (verify_ms + nothing * self.pass_ms(0, 1))


def _at(rows: tuple[int, ...], values: tuple[float, ...], num_rows: int) -> float:
    i = min(max(bisect_left(rows, num_rows), 1), len(rows) - 1)
    (x0, x1), (y0, y1) = rows[i - 1 : i + 1], values[i - 1 : i + 1]
    return max(y0 + (y1 - y0) * (num_rows - x0) / (x1 - x0), 0.0)


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
