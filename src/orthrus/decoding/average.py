"""A moving average whose first observations weigh more."""

from dataclasses import dataclass

MEMORY = 0.85
"""Weight of the past in a moving average, for each new observation."""


@dataclass(slots=True)
class Average:
    """A moving average; what it starts with counts as few observations, so the first ones weigh more."""

    value: float
    num_observed: int = 1

    def add(self, observed: float) -> None:
        self.num_observed += 1
        weight = max(1 - MEMORY, 1 / self.num_observed)
        self.value += weight * (observed - self.value)
