"""How far passes stray from their prices, as they are seen to: a busy machine makes all of them dearer."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log

CLASSES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Most rows of the passes that share a correction, and one class of those with more."""
WEIGHT, NEAR = 0.1, 0.5
"""Of one more pass in the correction of its class, and what is left of that weight for the next class."""
OUTLIER = 4.0
"""A pass counts at most as this many times dearer, or cheaper, than its corrected price."""


@dataclass(slots=True)
class PriceCorrection:
    """A factor for each class of rows, which follows the time of a pass over its price in the cost table.

    Averages are of logarithms, so that twice and half as long weigh alike. A pass also moves the classes
    beside its own, the less the further away: what slows the machine slows all, so a price that is not tried
    follows those that are, and `auto` does not stay away from passes that were dear once. For one thread at
    a time.
    """

    classes: Sequence[int] = CLASSES
    _logs: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._logs = [0.0] * (len(self.classes) + 1)

    def __call__(self, num_rows: int) -> float:
        """What the price of a pass of so many rows is to be multiplied by; 1 before anything was seen."""
        return exp(self._logs[self._class_of(num_rows)])

    def observe(self, num_rows: int, price_ms: float, measured_ms: float) -> None:
        """Take note of a pass: its rows of both views, its price in the table, and what it took.

        Times that are not positive say nothing and are left out.
        """
        if price_ms <= 0.0 or measured_ms <= 0.0:
            return
        own, most = self._class_of(num_rows), log(OUTLIER)
        ratio = log(measured_ms / price_ms)
        surprise = min(max(ratio - self._logs[own], -most), most)
        for i in range(len(self._logs)):
            self._logs[i] += WEIGHT * NEAR ** abs(i - own) * surprise

    def _class_of(self, num_rows: int) -> int:
        return bisect_left(self.classes, num_rows)
