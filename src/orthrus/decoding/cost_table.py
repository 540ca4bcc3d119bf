"""The cost of passes by their rows, measured on the machine. Passes that were not measured are estimated."""

from bisect import bisect_left
from dataclasses import dataclass

MOST_JOINT = 24
"""Up to so many guesses of blocks are projected together with the AR rows of their pass, before it is known which block
will be used. So few rows cost less than reading the head's weights a second time."""


@dataclass(frozen=True, slots=True)
class CostTable:
    """Milliseconds of a pass by its rows.

    `body_ms`, by `rows`: layers of a pass of AR rows. `head_ms`, by `rows`: projecting so many rows. `block_ms`, by
    `block_rows`: the time that block rows, which read weights of their own, add to a few AR rows. `draft_pass_ms`, by
    `draft_rows`: layers of a usual draft pass, of one AR row and the rows of one block. `proposal_ms`, by `guesses`:
    making the proposal of one block with so many guesses. Rows ascend. Costs are interpolated between the entries, and
    extrapolated beyond them. Fewer block rows than were timed cost at least their share.
    """

    rows: tuple[int, ...]
    body_ms: tuple[float, ...]
    head_ms: tuple[float, ...]
    block_rows: tuple[int, ...]
    block_ms: tuple[float, ...]
    draft_rows: tuple[int, ...]
    draft_pass_ms: tuple[float, ...]
    guesses: tuple[int, ...]
    proposal_ms: tuple[float, ...]

    def draft_ms(self, num_guesses: int) -> float:
        """Milliseconds of making the proposal of one block, without its pass."""
        return _at(self.guesses, self.proposal_ms, num_guesses)

    def __call__(self, num_ar: int, num_block: int = 0, num_projected: int = 0) -> float:
        """Milliseconds of a pass of AR rows, all projected, and block rows, of which `num_projected` are projected."""
        head_ms = _at(self.rows, self.head_ms, num_ar + num_projected)
        if num_ar == 1 and 0 < num_block <= self.draft_rows[-1]:
            return head_ms + _at(self.draft_rows, self.draft_pass_ms, num_block)
        added_ms = 0.0
        if num_block:
            share_ms = self.block_ms[0] * min(1.0, num_block / self.block_rows[0])
            added_ms = max(_at(self.block_rows, self.block_ms, num_block), share_ms)
        return head_ms + _at(self.rows, self.body_ms, num_ar) + added_ms


def joint_guesses(num_guesses: int, *, own_head: bool) -> int:
    """How many guesses of a pass's blocks are projected together with its AR rows: all or none.

    own_head: drafts have a head of their own, of lower precision or of fewer ids.
    """
    return 0 if own_head or num_guesses > MOST_JOINT else num_guesses


def _at(rows: tuple[int, ...], values: tuple[float, ...], num_rows: int) -> float:
    i = min(max(bisect_left(rows, num_rows), 1), len(rows) - 1)
    (x0, x1), (y0, y1) = rows[i - 1 : i + 1], values[i - 1 : i + 1]
    return max(y0 + (y1 - y0) * (num_rows - x0) / (x1 - x0), 0.0)
