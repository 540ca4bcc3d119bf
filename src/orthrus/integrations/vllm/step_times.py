"""Estimates the time of a step from its rows, by a fit to observed steps, for sizes that were not observed."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MEMORY = 0.98
"""Weight of the past, for each new step."""
FEWEST = 6
"""The least number of steps with drafts, and of steps without, before an estimate is given."""


@dataclass(slots=True)
class StepTimes:
    """A straight line over AR rows, and another one over the rows of a draft pass if there is one.

    They are fitted by weighted least squares; later steps have more weight. The lines are crude, because a machine
    computes a few rows in the time of one. So they only decide which trials to make.
    """

    _products_FF: NDArray[np.float64] = field(default_factory=lambda: 1e-6 * np.eye(4))
    _sums_F: NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))
    _num_plain: int = 0
    _num_drafted: int = 0

    def see(self, num_ar_rows: int, num_draft_rows: int, ms: float) -> None:
        """Record a step, which may hold parts of prompts."""
        features_F = _features(num_ar_rows, num_draft_rows)
        # Weights of relative errors, so that long steps do not outweigh short ones.
        weight = 1.0 / max(ms, 1e-3) ** 2
        self._products_FF = MEMORY * self._products_FF + weight * np.outer(features_F, features_F)
        self._sums_F = MEMORY * self._sums_F + weight * ms * features_F
        if num_draft_rows:
            self._num_drafted += 1
        else:
            self._num_plain += 1

    def of_drafts(self, num_requests: int, num_drafts: int) -> float | None:
        """Milliseconds of a step that verifies and drafts so many tokens for each; None while too little is known."""
        if min(self._num_plain, self._num_drafted) < FEWEST:
            return None
        rows = num_requests * (1 + num_drafts)
        shrunk_FF = self._products_FF + 1e-6 * np.trace(self._products_FF) * np.eye(4)
        found = float(np.linalg.solve(shrunk_FF, self._sums_F) @ _features(rows, rows if num_drafts else 0))
        return found if found > 0.0 else None


def _features(num_ar_rows: int, num_draft_rows: int) -> NDArray[np.float64]:
    return np.array([1.0, num_ar_rows / 16, float(num_draft_rows > 0), num_draft_rows / 16])
