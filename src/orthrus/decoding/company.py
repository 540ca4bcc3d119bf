"""Computes the share of a pass's cost for one of the requests in it."""

from dataclasses import dataclass

from orthrus.decoding.block_lengths import BlockLength
from orthrus.decoding.cost_table import joint_guesses
from orthrus.decoding.prices import Prices


@dataclass(frozen=True, slots=True)
class Company:
    """The batch of a pass, as one of its requests sees it: the number of requests, and the rows of prompts in the pass.

    All requests are assumed to carry equally many rows, and each pays its share of the pass. A pass reads the weights
    once, so with more requests the rows make up more of the cost. The rows of prompts are in the pass anyway, and each
    further row costs its full price.

    prices: of whole passes. own_head: drafts have a head of their own. shared: with several requests, the factor on
    the price of drafts' rows.
    """

    prices: Prices
    own_head: bool
    shared: float
    num_requests: int = 1
    num_prompt_rows: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """The values in which two companies of one request may differ: (requests, rows of prompts)."""
        return self.num_requests, self.num_prompt_rows

    def pass_ms(self, num_nodes: int, num_blocks: int, length: BlockLength) -> float:
        """This request's milliseconds of a verify pass with blocks.

        Without nodes it is a draft pass, and without nodes and blocks a plain pass.
        """
        key = (
            *(self.prices.version, self.shared, self.own_head, self.size),
            *(num_nodes, num_blocks, length.num_guesses),
        )
        ms = self.prices.shared_ms.get(key)
        if ms is None:
            n = self.num_requests
            num_guesses = joint_guesses(n * num_blocks * length.num_guesses, own_head=self.own_head)
            if not num_nodes and not self.own_head:
                # A block in a draft pass is used whatever the AR view chooses, so all its guesses are projected.
                num_guesses = n * num_blocks * length.num_guesses
            num_rows = self.num_prompt_rows + n * (1 + num_nodes)
            ms = self.prices(num_rows, n * num_blocks * length.rows, num_guesses) / n
            if n > 1:
                added_ms = ms - self.prices(self.num_prompt_rows + n) / n
                ms = self.prices(n) / n + self.shared * added_ms
            self.prices.shared_ms[key] = ms
        return ms

    def least_row_ms(self, most_nodes: int) -> float:
        """The least time that a row of drafts adds to the pass.

        Each request verifies at most `most_nodes` nodes, and no other drafts are in the pass.
        """
        key = self.prices.version, self.size, most_nodes
        ms = self.prices.shared_ms.get(key)
        if ms is None:
            num_rows = self.num_prompt_rows + self.num_requests
            without_ms = self.prices(num_rows)
            ms = min(
                (self.prices(num_rows + added) - without_ms) / added
                for added in range(1, self.num_requests * most_nodes + 1)
            )
            self.prices.shared_ms[key] = ms
        return ms
