"""The cost of passes by their rows, measured on the machine; it also estimates passes that were not measured."""

from bisect import bisect_left
from dataclasses import dataclass

MOST_JOINT = 24
"""Guesses of blocks that are projected together with the AR rows of their pass, before it is known which
block serves: so few rows cost less than reading the head a second time would."""


@dataclass(frozen=True, slots=True)
class CostTable:
    """Milliseconds of a pass by its rows: `body_ms` of AR rows, and `head_ms` of projecting as many.

    What block rows add is told apart, since they read weights of their own: `block_ms`, by `block_rows`,
    beside a few AR rows; `draft_pass_ms`, by `draft_rows`, of the pass that most drafts come from, one AR row
    and the rows of one block; and `draft_ms` of making a draft of one block. Rows ascend; between the entries
    costs are interpolated, beyond them extrapolated; fewer block rows than were timed cost at least their
    share.
    """

    rows: tuple[int, ...]
    body_ms: tuple[float, ...]
    head_ms: tuple[float, ...]
    block_rows: tuple[int, ...]
    block_ms: tuple[float, ...]
    draft_rows: tuple[int, ...]
    draft_pass_ms: tuple[float, ...]
    draft_ms: float

    def __call__(self, num_ar: int, num_block: int = 0, num_projected: int = 0) -> float:
        """A pass of AR rows, all projected, and block rows, of which `num_projected` are."""
        head_ms = _at(self.rows, self.head_ms, num_ar + num_projected)
        if num_ar == 1 and 0 < num_block <= self.draft_rows[-1]:
            return head_ms + _at(self.draft_rows, self.draft_pass_ms, num_block)
        added_ms = 0.0
        if num_block:
            share_ms = self.block_ms[0] * min(1.0, num_block / self.block_rows[0])
            added_ms = max(_at(self.block_rows, self.block_ms, num_block), share_ms)
        return head_ms + _at(self.rows, self.body_ms, num_ar) + added_ms


def joint_guesses(num_guesses: int, *, own_head: bool) -> int:
    """How many of the guesses of a pass's blocks are projected with its AR rows: all or none.

    own_head: drafts have a head of their own, of lower precision or of fewer ids.
    """
    return 0 if own_head or num_guesses > MOST_JOINT else num_guesses


def _at(rows: tuple[int, ...], values: tuple[float, ...], num_rows: int) -> float:
    i = min(max(bisect_left(rows, num_rows), 1), len(rows) - 1)
    (x0, x1), (y0, y1) = rows[i - 1 : i + 1], values[i - 1 : i + 1]
    return max(y0 + (y1 - y0) * (num_rows - x0) / (x1 - x0), 0.0)
