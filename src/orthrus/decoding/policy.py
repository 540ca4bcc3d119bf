"""Decides what each pass carries: a plain step or drafts, the length of blocks, the number of nodes and of blocks.

All values are in tokens: the worth of a pass is the number of tokens that it is expected to commit, minus the
number that its time would bring at the best known rate (the renewal-reward rule). Expectations are the draft's own
probabilities, corrected by the acceptance so far in this request. Times come from a table measured on the machine,
corrected by the observed times of passes. No decision can change the text: every token is the AR view's own
choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import exp
from typing import ClassVar, Literal

from orthrus.decoding.average import MEMORY, Average, Ratio
from orthrus.decoding.block_lengths import LENGTHS, BlockLength, Offer, block_lengths, first_expected, learn
from orthrus.decoding.company import Company
from orthrus.decoding.prices import Prices

Left = Literal["fresh", "stale", "none"]
"""The draft that a verification leaves: fresh (its block is at the end of the path), stale (further back), or none."""


@dataclass(slots=True)
class Policy:
    """The decisions for one request, whose blocks guess at most `most_guesses` tokens.

    max_nodes and max_blocks bound what a pass may carry. goes_on: the view's own, see `ViewConfig`.

    Averages over the request: the accepted drafts that a draft promised, with as many nodes as drafting would verify,
    fresh ones by the length of their block, and stale ones (their block had not seen all of the text); how much of the
    promises came true (what stands alone shows little where little is verified); by number of blocks, how often the
    text went on exactly where one of them stood; and how often a stale draft was left where it did not.

    PATIENCE: plain tokens before drafting gets another chance; doubled, up to MOST_PATIENCE, whenever the chance
    was wasted. SHARED: how much more the rows of drafts in a pass of several requests count than the table says (those
    of copies alone do not, see `compete`), because a request's draft costs time beside the pass too, and all requests
    wait for it. LENGTHS: see `block_lengths`. `benchmarks/policy_ablation.py` measures what each of them is worth.
    """

    PATIENCE: ClassVar[int] = 24
    MOST_PATIENCE: ClassVar[int] = 192
    SHARED: ClassVar[float] = 2.0
    LENGTHS: ClassVar[tuple[int, ...]] = LENGTHS

    costs: Prices
    most_guesses: int
    max_nodes: int
    max_blocks: int
    own_head: bool = False
    goes_on: float | None = None
    _lengths: list[BlockLength] = field(init=False)
    _length: BlockLength = field(init=False)
    _stale: Average = field(init=False)
    _left: Average = field(default_factory=lambda: Average(0.9))
    _hits: list[Average] = field(init=False)
    _fresh_trust: Ratio = field(default_factory=Ratio)
    _stale_trust: Ratio = field(default_factory=Ratio)
    _offers: list[Offer] = field(default_factory=list)
    _block_trust: Average = field(default_factory=lambda: Average(1.0))
    _plain_tokens: int = 0
    _patience: int = field(init=False)
    _choices: dict[tuple[int, int], tuple[BlockLength, float]] = field(default_factory=dict)
    _hopes: dict[tuple[int, int], float] = field(default_factory=dict)
    _draft_rate: float = field(init=False)
    _company: Company = field(init=False)
    _version: int = 0
    _has_learnt: bool = False

    def __post_init__(self) -> None:
        self._lengths = block_lengths(self.most_guesses, self.LENGTHS, self.goes_on)
        self._patience = self.PATIENCE
        self._stale = Average(first_expected(self.most_guesses, self.goes_on))
        self._hits = [Average(1.0 - 0.8**m) for m in range(self.max_blocks + 1)]
        self._company = Company(self.costs, self.own_head, self.SHARED)
        self._choose_length()

    def among(self, num_requests: int, num_prompt_rows: int = 0) -> None:
        """Decide as one of so many running requests, beside so many rows of prompts, see `Company`: drafts shrink."""
        size = num_requests, num_prompt_rows
        if self.costs.version != self._version:
            self._choices.clear()
            self._hopes.clear()
        elif size == self._company.size:
            return
        self._company = Company(self.costs, self.own_head, self.SHARED, *size)
        self._version = self.costs.version
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

    def pass_ms(self, num_nodes: int, num_blocks: int, length: BlockLength | None = None) -> float:
        """What the pass costs this request, see `Company`; length: of the blocks, the chosen one if left out."""
        return self._company.pass_ms(num_nodes, num_blocks, length or self._length)

    def rate(self) -> float:
        """The best rate known: what a millisecond is worth."""
        return max(self.plain_rate, self.draft_rate)

    def least_chance(self, most_nodes: int) -> float:
        """Below this chance of its first node, no chain of at most so many nodes pays, however sure the others are and
        however many of its company verify as much, where no other drafts are in the pass."""
        return self.rate() * self._company.least_row_ms(most_nodes)

    def wants_draft(self) -> bool:
        """Whether a draft pass is to be made now, where there is no draft."""
        plain = self.plain_rate
        if self.draft_rate > plain or (self._plain_tokens >= self._patience and self._hoped_rate() > plain):
            return True
        self._plain_tokens += 1
        return False

    def num_nodes(
        self,
        log_probs: Sequence[float],
        depths: Sequence[int],
        num_guesses: int,
        *,
        stale: bool,
        trying: bool = False,
    ) -> int:
        """How many nodes of a best-first tree to verify, given all nodes' path log probs in its order.

        Called before each `observe`, which learns from what it noted. depths: of the nodes, 1 for the
        anchor's children; num_guesses: of their draft. stale: the draft is. trying: a draft pass was made for
        them, maybe as a chance only. Then time is worth what drafting makes of it, even where plain decoding
        makes more: a chance that verifies too little would prove nothing.
        """
        probs = [exp(log_prob) for log_prob in log_probs]
        trust = (self._stale_trust if stale else self._fresh_trust).value
        drafting = self._offer(probs, trust, self.draft_rate)
        self._offers = [drafting]
        if not stale:
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

    def worth(self, log_probs: Sequence[float], is_view: Sequence[bool], *, stale: bool) -> int:
        """How many nodes of a best-first tree of several sources make most of their time.

        is_view: per node, whether the diffusion view proposed it: then it is trusted as far as the view's drafts
        are; other sources know what they are worth.
        """
        trust = (self._stale_trust if stale else self._fresh_trust).value
        probs = [exp(p) * (trust if view else 1.0) for p, view in zip(log_probs, is_view, strict=True)]
        promised = accumulate(probs[: self.max_nodes], initial=0.0)
        rate = self.rate()
        return _best([tokens - rate * self.pass_ms(n, 0) for n, tokens in enumerate(promised)])

    def keeps_stale(self) -> bool:
        """Whether a stale draft is worth verifying, rather than making a new one."""
        return self._length.num_guesses > 1 and self._worth(stale=True) > 0.0

    def num_blocks(self, num_nodes: int, end_probs: Sequence[float]) -> int:
        """How many blocks to add, given each row's chance to be where the path ends.

        While stale drafts are worth keeping the first block stands at the root: it lies on every path, and so
        leaves one. The others stand where the path most likely ends.
        """
        rate, fresh = self.rate(), self._worth(stale=False)
        stale = self._left.value * max(self._worth(stale=True), 0.0)
        root = 1 if self.keeps_stale() else 0
        chances = [*end_probs[:root], *sorted(end_probs[root:], reverse=True)][: self.max_blocks]
        hits = accumulate(self._block_trust.value * chance for chance in chances)
        values = [-rate * self.pass_ms(num_nodes, 0)]
        for num_blocks, hit in enumerate(hits, start=1):
            hit = min(hit, 1.0)
            values.append(hit * fresh + (1.0 - hit) * stale - rate * self.pass_ms(num_nodes, num_blocks))
        return _best(values)

    def observe(
        self,
        log_probs: Sequence[float],
        num_accepted: int,
        block_probs: Sequence[float],
        *,
        stale: bool,
        left: Left,
    ) -> None:
        """Take note of a verification: its nodes, how many stood, and whether their draft was a stale one; the
        chances that the path would end at its blocks, and what draft it left."""
        self._has_learnt = True
        verified = sum(exp(log_prob) for log_prob in log_probs)
        if block_probs:
            hit = float(left == "fresh")
            self._block_trust.add(min(hit / max(sum(block_probs), 0.05), 3.0))
            self._hits[len(block_probs)].add(hit)
            if not hit and self.keeps_stale():
                self._left.add(float(left == "stale"))
        if stale:
            self._stale.add(self._offers[-1].promised)
            self._stale_trust.add(num_accepted, verified)
        else:
            learn(self._lengths, self._offers, self.goes_on)
            self._fresh_trust.add(num_accepted, verified)
            if not self.keeps_stale():
                # One bad stale draft must not be the last: what is not tried is slowly trusted again.
                self._stale_trust.add(0.0, 0.0)
                self._stale.value += (1 - MEMORY) * (self._length.promised.value - self._stale.value)
        self._choices.clear()
        self._choose_length()
        if self._plain_tokens >= self._patience:
            worth = self.draft_rate > self.plain_rate
            self._patience = self.PATIENCE if worth else min(2 * self._patience, self.MOST_PATIENCE)
        self._plain_tokens = 0

    def _offer(self, probs: Sequence[float], trust: float, rate: float) -> Offer:
        """The first nodes that make most of their time."""
        promised = list(accumulate(probs, initial=0.0))
        values = [trust * tokens - rate * self.pass_ms(n, 0) for n, tokens in enumerate(promised)]
        best = _best(values)
        return Offer(promised[best], best)

    def _choose_length(self) -> None:
        """The length of blocks that makes most of its time, and what it makes of it.

        Nothing is learnt while nothing is drafted, so the choice is kept by the company.
        """
        size = self._company.size
        if size not in self._choices:
            # Requests that have learnt nothing yet choose alike.
            known = {} if self._has_learnt else self.costs.first_choices
            key = (
                *(self.costs.version, type(self), self.own_head, size),
                *(self.most_guesses, self.max_blocks, self.goes_on),
            )
            choice = known.get(key)
            if choice is None:
                rates = [
                    max(self._steady_rate(length, m) for m in range(self.max_blocks + 1))
                    for length in self._lengths
                ]
                best = _best(rates)
                choice = known[key] = best, rates[best]
            self._choices[size] = self._lengths[choice[0]], choice[1]
        self._length, self._draft_rate = self._choices[size]

    def _hoped_rate(self) -> float:
        """Tokens a millisecond of drafts that fare as first expected. It depends on prices and company alone."""
        size = self._company.size
        if size not in self._hopes:
            self._hopes[size] = max(
                self._two_pass_rate(n, first_expected(n.num_guesses, self.goes_on), n.num_guesses)
                for n in self._lengths
            )
        return self._hopes[size]

    def _two_pass_rate(self, length: BlockLength, num_stand: float, num_nodes: int) -> float:
        """Tokens a millisecond of a draft pass and a verification that leaves no draft; num_stand: drafts."""
        verify_ms = self.pass_ms(num_nodes, 0, length) + self.costs.draft_ms
        return (2.0 + num_stand) / (self.pass_ms(0, 1, length) + verify_ms)

    def _worth(self, *, stale: bool) -> float:
        """Tokens that a draft at hand is worth: it saves the draft pass, but also the one token which that
        would have decided, and fewer drafts stand of a stale one."""
        saved = self.rate() * self.pass_ms(0, 1) - 1.0
        num_fresh = self._num_fresh(self._length)
        return saved - (num_fresh - self._num_stale(num_fresh) if stale else 0.0)

    def _num_fresh(self, length: BlockLength) -> float:
        """How many drafts of a fresh draft are expected to stand."""
        return self._fresh_trust.value * length.promised.value

    def _num_stale(self, num_fresh: float) -> float:
        # What was seen of stale drafts may be long ago; they are no better than fresh ones.
        return min(self._stale_trust.value * self._stale.value, num_fresh)

    def _steady_rate(self, length: BlockLength, num_blocks: int) -> float:
        """A verification with so many blocks, and a draft pass where it leaves nothing."""
        fresh, num_nodes = self._num_fresh(length), round(length.num_nodes.value)
        if not num_blocks:
            return self._two_pass_rate(length, fresh, num_nodes)
        draft_ms = self.pass_ms(0, 1, length)
        verify_ms = self.pass_ms(num_nodes, num_blocks, length) + self.costs.draft_ms
        hit = self._hits[num_blocks].value
        # Of a single guess nothing is left once it has been decided.
        stale = (1.0 - hit) * self._left.value if length.num_guesses > 1 else 0.0
        nothing = 1.0 - hit - stale
        tokens = 1.0 + (hit + nothing) * fresh + stale * self._num_stale(fresh) + nothing
        return tokens / (verify_ms + nothing * draft_ms)


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
