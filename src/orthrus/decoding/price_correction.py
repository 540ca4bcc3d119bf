"""Estimates how far the times of passes deviate from their prices. A busy machine makes all of them dearer."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log

CLASSES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Upper limits of the classes of rows. Passes of one class share a correction. One more class holds larger passes."""
WEIGHT, NEAR = 0.1, 0.5
"""WEIGHT: of a new pass in the correction of its class. NEAR: the factor on that weight for each class further away."""
OUTLIER = 4.0
"""A pass counts as at most this many times dearer, or cheaper, than its corrected price."""


@dataclass(slots=True)
class PriceCorrection:
    """A factor for each class of rows: a moving average of (time of a pass / its price in the cost table).

    Averages are of logarithms, so that twice and half as long have the same weight. A pass also moves the classes near
    its own, the less the further away. A busy machine slows all passes, so the price of passes that are not tried
    follows those that are. Otherwise `auto` would avoid for ever a kind of passes that was dear once. For use by one
    thread at a time.
    """

    classes: Sequence[int] = CLASSES
    _logs: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._logs = [0.0] * (len(self.classes) + 1)

    def __call__(self, num_rows: int) -> float:
        """The factor on the price of a pass of so many rows; 1 before the first observation."""
        return exp(self._logs[self._class_of(num_rows)])

    def observe(self, num_rows: int, price_ms: float, measured_ms: float) -> None:
        """Record a pass: its rows of both views, its price in the table, and its time.

        Times and prices that are not positive are ignored.
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
