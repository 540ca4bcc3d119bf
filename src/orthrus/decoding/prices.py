"""The current prices of passes: the machine's cost table, corrected by the observed times of passes."""

from math import log2

from orthrus.decoding.cost_table import CostTable
from orthrus.decoding.price_correction import CLASSES, PriceCorrection

CHANGE = 0.12
"""In doublings (a twelfth of the time): prices change once the correction of a class of passes has moved so far. Noise
does not, and all that was computed from the prices is kept until then."""


MOST_KNOWN = 1 << 14
"""Limit on the prices that are kept. A pass of many requests asks for some hundred."""


class Prices:
    """A cost table that follows the machine. Beside a busy process passes cost more, and not all by the same factor.

    version: rises after each change of prices. shared_ms: results that the policies of all requests computed from the
    prices. first_choices: the index of the length of blocks that a request chooses before it has learnt anything, and
    its rate. The keys of both begin with the version, which a policy reads before it asks for a price. So a result that
    another thread computes during a change is not used after it. Only the engine that runs the passes calls `observe`.
    Any thread may ask for prices.
    """

    def __init__(self, costs: CostTable) -> None:
        self.costs = costs
        self.version = 0
        self.shared_ms: dict[tuple[object, ...], float] = {}
        self.first_choices: dict[tuple[object, ...], tuple[int, float]] = {}
        self._correction = PriceCorrection()
        # All classes change at the same time: a change of one alone would make its passes look dear beside the others.
        self._used = dict.fromkeys(CLASSES, 0.0)
        # All requests ask for the same few prices again and again.
        self._known: dict[tuple[int, int, int, int], float] = {}

    def draft_ms(self, num_guesses: int) -> float:
        """Milliseconds of making the proposal of one block, without its pass."""
        return self.costs.draft_ms(num_guesses) * self._factor(1)

    def __call__(self, num_ar: int, num_block: int = 0, num_projected: int = 0) -> float:
        """Milliseconds of a pass of AR rows, all projected, and block rows, of which `num_projected` are projected."""
        key = self.version, num_ar, num_block, num_projected
        ms = self._known.get(key)
        if ms is None:
            ms = self.costs(num_ar, num_block, num_projected) * self._factor(num_ar + num_block)
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = ms
        return ms

    def observe(self, num_ar: int, num_block: int, num_projected: int, measured_ms: float) -> None:
        """Record the time of a pass."""
        num_rows = num_ar + num_block
        self._correction.observe(num_rows, self.costs(num_ar, num_block, num_projected), measured_ms)
        now = {rows: log2(self._correction(rows)) for rows in CLASSES}
        if any(abs(now[rows] - used) > CHANGE for rows, used in self._used.items()):
            self._used = now
            self.version += 1
            self._known.clear()
            self.shared_ms.clear()
            self.first_choices.clear()

    def _factor(self, num_rows: int) -> float:
        rows = next((rows for rows in CLASSES if num_rows <= rows), CLASSES[-1])
        return float(2.0 ** self._used[rows])
