"""Which passes are worth their time: plain steps, drafts, how long, how many nodes, how many blocks beside.

All values are in tokens: a pass is worth the tokens it is expected to commit, less what its time would have
brought at the best rate known (the renewal-reward rule). Expectations are the draft's own probabilities,
corrected by how they fared so far in this request; times come from a table measured once on the machine, and
follow what passes are seen to take. None of them can change the text: every token is the AR view's own choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from math import exp
from typing import Literal, NamedTuple

from orthrus.decoding.average import MEMORY, Average
from orthrus.decoding.cost_table import joint_guesses
from orthrus.decoding.prices import Prices

MARGIN = 1.05
"""Drafting must promise this much more than plain decoding before it is taken up or kept."""
PATIENCE, MAX_PATIENCE = 24, 192
"""Plain tokens before drafting gets another chance; doubled whenever the chance was wasted. There is none where
even a draft that fares as first expected would not pay: in company all requests wait for one that tries."""
GOES_ON, NUM_PROMISED, LATE_SHARE = 0.7, 2, 0.6
"""Chance that a guess stands where those before it did, expected before a draft was made; how many drafts
that counts for; and the part of what a draft promises that a late one does: so a request starts by drafting,
unless rows are dear."""
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Tokens that blocks may guess, where they can guess more."""
SHARED = 1.25
"""How much dearer rows that are added to a pass of several requests count than the table says: each request's
draft costs time beside the pass too, and what one request adds, all wait for."""
STRAYS = 0.1
"""How far what longer blocks than a draft's are supposed to have promised returns to that expectation."""
TRUSTED = 2.0
"""How many accepted drafts, all of them promised, are taken for granted: a few say little about promises."""

Left = Literal["fresh", "late", "none"]
"""The draft that a verification leaves: of a block where the path ended, of one further back, or none."""


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


class _Offer(NamedTuple):
    """Accepted drafts that a draft promises, with as many nodes as are worth their time (on average)."""

    promised: float
    num_nodes: float


@dataclass(slots=True)
class _Length:
    """Blocks of one length: what their drafts promise, with as many nodes as drafting would verify."""

    num_guesses: int
    promised: Average
    num_nodes: Average

    @property
    def rows(self) -> int:
        """Those that guess, and the first, whose guess the AR row at the anchor decides."""
        return 1 + self.num_guesses


@dataclass(slots=True)
class Policy:
    """The decisions of one request, whose blocks guess `most_guesses` tokens at most.

    max_nodes and max_blocks bound what a pass may carry. Averages over the request: the accepted drafts that
    a draft promised, with as many nodes as drafting would verify, fresh ones by the length of their block,
    and late ones (their block had not seen all of the text); how much of the promises came true (what stands
    alone shows little where little is verified); by number of blocks, how often the text went on exactly
    where one of them stood; and how often a late draft was left where it did not.
    """

    costs: Prices
    most_guesses: int
    max_nodes: int
    max_blocks: int
    own_head: bool = False
    _lengths: list[_Length] = field(init=False)
    _length: _Length = field(init=False)
    _late: Average = field(init=False)
    _left: Average = field(default_factory=lambda: Average(0.9))
    _hits: list[Average] = field(init=False)
    _fresh_trust: _Ratio = field(default_factory=_Ratio)
    _late_trust: _Ratio = field(default_factory=_Ratio)
    _offers: list[_Offer] = field(default_factory=list)
    _block_trust: Average = field(default_factory=lambda: Average(1.0))
    _plain_tokens: int = 0
    _patience: int = PATIENCE
    _pass_ms: dict[tuple[int, int, int, int, int], float] = field(default_factory=dict)
    _choices: dict[tuple[int, int], tuple[_Length, float]] = field(default_factory=dict)
    _hopes: dict[tuple[int, int], float] = field(default_factory=dict)
    _draft_rate: float = field(init=False)
    _company: tuple[int, int] = (1, 0)
    _version: int = 0

    def __post_init__(self) -> None:
        sizes = [n for n in LENGTHS if n < self.most_guesses]
        self._lengths = [
            _Length(n, Average(_expected(n), NUM_PROMISED), Average(1.0 + n))
            for n in (*sizes, self.most_guesses)
        ]
        self._late = Average(LATE_SHARE * _expected(self.most_guesses))
        self._hits = [Average(1.0 - 0.8**m) for m in range(self.max_blocks + 1)]
        self._choose_length()

    def among(self, num_requests: int, num_prompt_rows: int = 0) -> None:
        """Decide as one of so many running requests: a pass costs this one its share of what it costs when all
        carry as much. Rows then cost more beside the weights that are read once, and drafts shrink.

        num_prompt_rows: rows of prompts in the pass. They are paid for anyway, and beside them each further row
        costs its full price.
        """
        company = num_requests, num_prompt_rows
        if self.costs.version != self._version:
            self._pass_ms.clear()
            self._choices.clear()
            self._hopes.clear()
        elif company == self._company:
            return
        self._company, self._version = company, self.costs.version
        self._choose_length()

    @property
    def block_size(self) -> int:
        """Rows of the blocks that are to be drafted next."""
        return self._length.rows

    @property
    def plain_rate(self) -> float:
        """Tokens a millisecond of plain decoding."""
        return 1.0 / self.pass_ms(0, 0)

    @property
    def draft_rate(self) -> float:
        """Tokens a millisecond of drafting and verifying, with the blocks that make most of it."""
        return self._draft_rate

    def pass_ms(self, num_nodes: int, num_blocks: int, length: _Length | None = None) -> float:
        """A verification with blocks beside it; without nodes a draft pass, without either a plain one."""
        length = length or self._length
        key = *self._company, num_nodes, num_blocks, length.num_guesses
        if key not in self._pass_ms:
            n, num_prompt_rows = self._company
            num_guesses = joint_guesses(n * num_blocks * length.num_guesses, own_head=self.own_head)
            if not num_nodes and not self.own_head:
                # A block that is drafted alone serves whatever the AR view chooses.
                num_guesses = n * num_blocks * length.num_guesses
            num_rows = num_prompt_rows + n * (1 + num_nodes)
            ms = self.costs(num_rows, n * num_blocks * length.rows, num_guesses) / n
            if n > 1:
                added_ms = ms - self.costs(num_prompt_rows + n) / n
                ms = self.costs(n) / n + SHARED * added_ms
            self._pass_ms[key] = ms
        return self._pass_ms[key]

    def rate(self) -> float:
        """The best rate known: what a millisecond is worth."""
        return max(self.plain_rate, self.draft_rate)

    def wants_draft(self) -> bool:
        """Whether a draft pass is to be made now, where there is no draft."""
        least = MARGIN * self.plain_rate
        if self.draft_rate > least or (self._plain_tokens >= self._patience and self._hoped_rate() > least):
            return True
        self._plain_tokens += 1
        return False

    def num_nodes(
        self,
        log_probs: Sequence[float],
        depths: Sequence[int],
        num_guesses: int,
        *,
        late: bool,
        trying: bool = False,
    ) -> int:
        """How many nodes of a best-first tree to verify, given all nodes' path log probs in its order.

        Called before each `observe`, which learns from what it noted. depths: of the nodes, 1 for the
        anchor's children; num_guesses: of their draft. late: the draft is. trying: a draft pass was made for
        them, maybe as a chance only. Then time is worth what drafting makes of it, even where plain decoding
        makes more: a chance that verifies too little would prove nothing.
        """
        probs = [exp(log_prob) for log_prob in log_probs]
        trust = (self._late_trust if late else self._fresh_trust).value
        drafting = self._offer(probs, trust, self.draft_rate)
        self._offers = [drafting]
        if not late:
            # Shorter blocks would have promised what is not so deep.
            deepest = max(depths, default=0)
            for length in [n for n in self._lengths if n.num_guesses < num_guesses][::-1]:
                if length.num_guesses < deepest:
                    near = [p for p, depth in zip(probs, depths, strict=True) if depth <= length.num_guesses]
                    self._offers.append(self._offer(near, trust, self.draft_rate))
                else:
                    self._offers.append(drafting)
            self._offers.reverse()
        # Mostly drafting is the best that is known.
        same = trying or self.rate() == self.draft_rate
        return int((drafting if same else self._offer(probs, trust, self.rate())).num_nodes)

    def chain_rate(self, promised: Sequence[float]) -> float:
        """Tokens a millisecond of verifying a chain without a draft pass; promised: accepted drafts among the
        first one, two, ... of its nodes. 0 without a chain."""
        rates = [(1.0 + tokens) / self.pass_ms(n, 0) for n, tokens in enumerate(promised, start=1)]
        return max(rates, default=0.0)

    def worth(self, log_probs: Sequence[float], is_view: Sequence[bool], *, late: bool) -> int:
        """How many nodes of a best-first tree of several sources make most of their time.

        is_view: per node, whether the diffusion view proposed it: then it is trusted as far as the view's drafts
        are; other sources know what they are worth.
        """
        trust = (self._late_trust if late else self._fresh_trust).value
        probs = [exp(p) * (trust if view else 1.0) for p, view in zip(log_probs, is_view, strict=True)]
        promised = accumulate(probs[: self.max_nodes], initial=0.0)
        rate = self.rate()
        return _best([tokens - rate * self.pass_ms(n, 0) for n, tokens in enumerate(promised)])

    def keeps_late(self) -> bool:
        """Whether a late draft is worth verifying, rather than making a new one."""
        return self._length.num_guesses > 1 and self._worth(late=True) > 0.0

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
        if late:
            self._late.add(self._offers[-1].promised)
            self._late_trust.add(num_accepted, verified)
        else:
            self._learn_lengths()
            self._fresh_trust.add(num_accepted, verified)
            if not self.keeps_late():
                # One bad late draft must not be the last: what is not tried is slowly trusted again.
                self._late_trust.add(0.0, 0.0)
                late_promise = LATE_SHARE * self._length.promised.value
                self._late.value += (1 - MEMORY) * (late_promise - self._late.value)
        self._choices.clear()
        self._choose_length()
        if self._plain_tokens >= self._patience:
            worth = self.draft_rate > MARGIN * self.plain_rate
            self._patience = PATIENCE if worth else min(2 * self._patience, MAX_PATIENCE)
        self._plain_tokens = 0

    def _offer(self, probs: Sequence[float], trust: float, rate: float) -> _Offer:
        """The first nodes that make most of their time."""
        promised = list(accumulate(probs, initial=0.0))
        values = [trust * tokens - rate * self.pass_ms(n, 0) for n, tokens in enumerate(promised)]
        best = _best(values)
        return _Offer(promised[best], best)

    def _learn_lengths(self) -> None:
        """Take note of what a fresh draft offered, by the length of its block.

        Longer blocks than it came from would have gone on as they used to do beyond the same depth; what is
        not tried is slowly expected to do as it was at first.
        """
        before = here = _Offer(0.0, 0)
        known = [(0.0, 0.0), (0.0, 0.0), *((n.promised.value, n.num_nodes.value) for n in self._lengths)]
        first = [0.0, 0.0, *(_expected(n.num_guesses) for n in self._lengths)]
        for i, length in enumerate(self._lengths):
            if i < len(self._offers):
                offer = self._offers[i]
            else:
                (p0, _), (p1, n1), (p2, n2) = known[i : i + 3]
                usual = (first[i + 2] - first[i + 1]) / (first[i + 1] - first[i])
                goes_on = max(p2 - p1, 0.0) / (p1 - p0) if p1 > p0 else usual
                goes_on += STRAYS * (usual - goes_on)
                more = min(goes_on * (here.promised - before.promised), length.num_guesses - here.promised)
                offer = _Offer(here.promised + more, here.num_nodes + max(n2 - n1, 0.0))
            before, here = here, offer
            length.promised.add(offer.promised)
            length.num_nodes.add(offer.num_nodes)

    def _choose_length(self) -> None:
        """The length of blocks that makes most of its time, and what it makes of it.

        Nothing is learnt while nothing is drafted, so the choice is kept by the company.
        """
        if self._company not in self._choices:
            rates = [
                max(self._steady_rate(length, m) for m in range(self.max_blocks + 1))
                for length in self._lengths
            ]
            best = _best(rates)
            self._choices[self._company] = self._lengths[best], rates[best]
        self._length, self._draft_rate = self._choices[self._company]

    def _hoped_rate(self) -> float:
        """Tokens a millisecond of drafts that fare as first expected. It depends on prices and company alone."""
        if self._company not in self._hopes:
            self._hopes[self._company] = max(
                self._two_pass_rate(n, _expected(n.num_guesses), n.num_guesses) for n in self._lengths
            )
        return self._hopes[self._company]

    def _two_pass_rate(self, length: _Length, num_stand: float, num_nodes: int) -> float:
        """Tokens a millisecond of a draft pass and a verification that leaves no draft; num_stand: drafts."""
        verify_ms = self.pass_ms(num_nodes, 0, length) + self.costs.draft_ms
        return (2.0 + num_stand) / (self.pass_ms(0, 1, length) + verify_ms)

    def _worth(self, *, late: bool) -> float:
        """Tokens that a draft at hand is worth: it saves the draft pass, but also the one token which that
        would have decided, and fewer drafts stand of a late one."""
        saved = self.rate() * self.pass_ms(0, 1) - 1.0
        num_fresh = self._num_fresh(self._length)
        return saved - (num_fresh - self._num_late(num_fresh) if late else 0.0)

    def _num_fresh(self, length: _Length) -> float:
        """How many drafts of a fresh draft are expected to stand."""
        return self._fresh_trust.value * length.promised.value

    def _num_late(self, num_fresh: float) -> float:
        # What was seen of late drafts may be long ago; they are no better than fresh ones.
        return min(self._late_trust.value * self._late.value, num_fresh)

    def _steady_rate(self, length: _Length, num_blocks: int) -> float:
        """A verification with so many blocks, and a draft pass where it leaves nothing."""
        fresh, num_nodes = self._num_fresh(length), round(length.num_nodes.value)
        if not num_blocks:
            return self._two_pass_rate(length, fresh, num_nodes)
        draft_ms = self.pass_ms(0, 1, length)
        verify_ms = self.pass_ms(num_nodes, num_blocks, length) + self.costs.draft_ms
        hit = self._hits[num_blocks].value
        # Of a single guess nothing is left once it has been decided.
        late = (1.0 - hit) * self._left.value if length.num_guesses > 1 else 0.0
        nothing = 1.0 - hit - late
        tokens = 1.0 + (hit + nothing) * fresh + late * self._num_late(fresh) + nothing
        return tokens / (verify_ms + nothing * draft_ms)


@cache
def _expected(num_guesses: int) -> float:
    """Accepted drafts of a block, before one was made."""
    return sum(GOES_ON**i for i in range(1, num_guesses + 1))


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
