"""Decides what each pass carries: a plain step or drafts, the length of blocks, the number of nodes and of blocks.

A proposal is the set of drafts that come from one block. All values are in tokens. The value of a pass is the number of
tokens that it is expected to commit, minus the number that its time would bring at the best known rate (the
renewal-reward rule). Expectations are the proposal's own probabilities, corrected by the acceptance so far in this
request. Times come from a table measured on the machine, corrected by the observed times of passes. No decision can
change the text, because the AR view chooses every token.
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
"""The proposal that a verification leaves: fresh (its block is at the end of the path), stale (further back), none."""


@dataclass(slots=True)
class Policy:
    """The decisions for one request, whose blocks guess at most `most_guesses` tokens.

    max_nodes and max_blocks are limits of one pass. goes_on: the view's own, see `ViewConfig`.

    The policy keeps these averages over the request:

    * `_lengths`: for each length of blocks, the accepted drafts that a fresh proposal promised, if as many nodes were
      verified as drafting would verify.
    * `_stale`: the same for stale proposals, whose block had not seen all of the text.
    * `_fresh_trust`, `_stale_trust`: accepted drafts / promised drafts. The accepted drafts alone would show little
      where few are verified.
    * `_hits[n]`: with n blocks, how often the accepted path ended at one of them.
    * `_block_trust`: hits / the hits that the proposals' probabilities promised.
    * `_left`: how often a stale proposal remained when the path did not end at a block.

    PATIENCE: plain tokens before the next trial of drafting; doubled, up to MOST_PATIENCE, after a trial that did not
    pay. SHARED: the factor on the cost of drafts' rows in a pass of several requests. A request's drafts cost time
    beside the pass too, and all requests wait for it. Rows of copies that are verified alone have no such factor, see
    `compete`. LENGTHS: see `block_lengths`. `benchmarks/policy_ablation.py` measures the effect of each of them.
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
        """Decide as one of so many running requests, with so many rows of prompts in the pass: drafts shrink."""
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
        """Rows of the next blocks."""
        return self._length.rows

    @property
    def plain_rate(self) -> float:
        """Tokens per millisecond of plain decoding."""
        return 1.0 / self.pass_ms(0, 0)

    @property
    def draft_rate(self) -> float:
        """Tokens per millisecond of drafting and verifying, with the best length and number of blocks."""
        return self._draft_rate

    def pass_ms(self, num_nodes: int, num_blocks: int, length: BlockLength | None = None) -> float:
        """This request's share of a pass's cost, see `Company`. length: of the blocks; by default the chosen one."""
        return self._company.pass_ms(num_nodes, num_blocks, length or self._length)

    def rate(self) -> float:
        """The best known rate: the tokens that a millisecond is worth."""
        return max(self.plain_rate, self.draft_rate)

    def least_chance(self, most_nodes: int) -> float:
        """The least acceptance probability of its first node with which a chain of at most so many nodes can pay.

        It holds for passes without other drafts, even if all later nodes are certain and all requests of the company
        verify as many nodes.
        """
        return self.rate() * self._company.least_row_ms(most_nodes)

    def wants_draft(self) -> bool:
        """Whether to make a draft pass now, when there is no proposal."""
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
        """The number of nodes of a best-first tree to verify.

        Call it before each `observe`, which uses the values noted here. log_probs: the path log prob of each node, in
        the tree's order. depths: of the nodes, 1 for the anchor's children. num_guesses: of their proposal. stale:
        whether the proposal is stale. trying: a draft pass was made for these nodes, possibly as a trial. Then time is
        worth what drafting makes of it, even where plain decoding is faster. A trial that verifies too few drafts
        would prove nothing.
        """
        probs = [exp(log_prob) for log_prob in log_probs]
        trust = (self._stale_trust if stale else self._fresh_trust).value
        drafting = self._offer(probs, trust, self.draft_rate)
        self._offers = [drafting]
        if not stale:
            # A shorter block would have promised only the nodes that are not deeper than its length.
            deepest = max(depths, default=0)
            for length in [n for n in self._lengths if n.num_guesses < num_guesses][::-1]:
                if length.num_guesses < deepest:
                    near = [p for p, depth in zip(probs, depths, strict=True) if depth <= length.num_guesses]
                    self._offers.append(self._offer(near, trust, self.draft_rate))
                else:
                    self._offers.append(drafting)
            self._offers.reverse()
        # In most cases drafting has the best known rate.
        same = trying or self.rate() == self.draft_rate
        return int((drafting if same else self._offer(probs, trust, self.rate())).num_nodes)

    def chain_rate(self, promised: Sequence[float]) -> float:
        """Tokens per millisecond of verifying a chain without a draft pass; 0 without a chain.

        promised: the expected accepted drafts among the first one, two, ... of its nodes.
        """
        rates = [(1.0 + tokens) / self.pass_ms(n, 0) for n, tokens in enumerate(promised, start=1)]
        return max(rates, default=0.0)

    def worth(self, log_probs: Sequence[float], is_view: Sequence[bool], *, stale: bool) -> int:
        """How many nodes of a best-first tree of several sources are worth more than the time they take.

        is_view: for each node, whether the diffusion view proposed it. Then its probability is corrected by the trust
        in the view's drafts. The probabilities of other sources need no correction.
        """
        trust = (self._stale_trust if stale else self._fresh_trust).value
        probs = [exp(p) * (trust if view else 1.0) for p, view in zip(log_probs, is_view, strict=True)]
        promised = accumulate(probs[: self.max_nodes], initial=0.0)
        rate = self.rate()
        return _best([tokens - rate * self.pass_ms(n, 0) for n, tokens in enumerate(promised)])

    def keeps_stale(self) -> bool:
        """Whether a stale proposal is worth verifying, rather than making a new one."""
        return self._length.num_guesses > 1 and self._worth(stale=True) > 0.0

    def num_blocks(self, num_nodes: int, end_probs: Sequence[float]) -> int:
        """How many blocks to add to a verification. end_probs: the probability that the path ends at each row.

        While stale proposals are worth keeping, the first block is at the root. The root is on every path, so this
        block always leaves a proposal. The other blocks are where the path most probably ends.
        """
        rate, fresh = self.rate(), self._worth(stale=False)
        stale = self._left.value * max(self._worth(stale=True), 0.0)
        root = 1 if self.keeps_stale() else 0
        probs = [*end_probs[:root], *sorted(end_probs[root:], reverse=True)][: self.max_blocks]
        hits = accumulate(self._block_trust.value * prob for prob in probs)
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
        """Learn from a verification.

        log_probs: of the verified nodes. num_accepted: how many of them were accepted. block_probs: the probability
        that the path would end at each of its blocks. stale: whether the nodes' proposal was stale. left: the proposal
        that the verification left.
        """
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
                # While no stale proposal is tried, the trust in them slowly returns. Otherwise one bad one would be
                # the last.
                self._stale_trust.add(0.0, 0.0)
                self._stale.value += (1 - MEMORY) * (self._length.promised.value - self._stale.value)
        self._choices.clear()
        self._choose_length()
        if self._plain_tokens >= self._patience:
            worth = self.draft_rate > self.plain_rate
            self._patience = self.PATIENCE if worth else min(2 * self._patience, self.MOST_PATIENCE)
        self._plain_tokens = 0

    def _offer(self, probs: Sequence[float], trust: float, rate: float) -> Offer:
        """The best number of first nodes to verify, and the accepted drafts that they promise."""
        promised = list(accumulate(probs, initial=0.0))
        values = [trust * tokens - rate * self.pass_ms(n, 0) for n, tokens in enumerate(promised)]
        best = _best(values)
        return Offer(promised[best], best)

    def _choose_length(self) -> None:
        """Choose the length of blocks with the best rate.

        The policy learns nothing while it drafts nothing, so the choice is kept for each size of the company.
        """
        size = self._company.size
        if size not in self._choices:
            # Requests that have learnt nothing yet make the same choice.
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
        """Tokens per millisecond if acceptance is as first expected. It depends only on prices and company."""
        size = self._company.size
        if size not in self._hopes:
            self._hopes[size] = max(
                self._two_pass_rate(n, first_expected(n.num_guesses, self.goes_on), n.num_guesses)
                for n in self._lengths
            )
        return self._hopes[size]

    def _two_pass_rate(self, length: BlockLength, num_accepted: float, num_nodes: int) -> float:
        """Tokens per millisecond of a draft pass and a verification that leaves no proposal."""
        verify_ms = self.pass_ms(num_nodes, 0, length) + self.costs.draft_ms(length.num_guesses)
        return (2.0 + num_accepted) / (self.pass_ms(0, 1, length) + verify_ms)

    def _worth(self, *, stale: bool) -> float:
        """The value of an existing proposal, in tokens.

        It saves a draft pass, but also the one token that the draft pass would have decided. Of a stale proposal fewer
        drafts are accepted.
        """
        saved = self.rate() * self.pass_ms(0, 1) - 1.0
        num_fresh = self._num_fresh(self._length)
        return saved - (num_fresh - self._num_stale(num_fresh) if stale else 0.0)

    def _num_fresh(self, length: BlockLength) -> float:
        """Expected accepted drafts of a fresh proposal."""
        return self._fresh_trust.value * length.promised.value

    def _num_stale(self, num_fresh: float) -> float:
        """Expected accepted drafts of a stale proposal."""
        # The observations of stale proposals may be old. These are no better than fresh ones.
        return min(self._stale_trust.value * self._stale.value, num_fresh)

    def _steady_rate(self, length: BlockLength, num_blocks: int) -> float:
        """Tokens per millisecond of verifications with so many blocks. A draft pass follows if no proposal is left."""
        fresh, num_nodes = self._num_fresh(length), round(length.num_nodes.value)
        if not num_blocks:
            return self._two_pass_rate(length, fresh, num_nodes)
        draft_ms = self.pass_ms(0, 1, length)
        verify_ms = self.pass_ms(num_nodes, num_blocks, length) + self.costs.draft_ms(length.num_guesses)
        hit = self._hits[num_blocks].value
        # After a single guess has been decided, nothing is left of it.
        stale = (1.0 - hit) * self._left.value if length.num_guesses > 1 else 0.0
        nothing = 1.0 - hit - stale
        tokens = 1.0 + (hit + nothing) * fresh + stale * self._num_stale(fresh) + nothing
        return tokens / (verify_ms + nothing * draft_ms)


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
