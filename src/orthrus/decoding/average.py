"""Moving averages: of values (the first observations weigh more), and of the ratio of accepted to promised drafts."""

from dataclasses import dataclass, field

MEMORY = 0.85
"""The default weight of the past in a moving average, for each new observation."""
TRUSTED = 2.0
"""Both sums of a `Ratio` start at this value, as if so many drafts had been promised and accepted. So the first few
observations change the ratio little."""


@dataclass(slots=True)
class Average:
    """A moving average. Its start value counts as a few observations, so the first observations weigh more.

    memory: weight of the past, for each new observation.
    """

    value: float
    num_observed: int = 1
    memory: float = MEMORY

    def add(self, observed: float) -> None:
        self.num_observed += 1
        weight = max(1 - self.memory, 1 / self.num_observed)
        self.value += weight * (observed - self.value)


@dataclass(slots=True)
class Ratio:
    """Ratio of accepted to promised drafts, from two moving sums. Both have the same start value, so it starts at 1.

    memory: weight of the past, for each new observation. start: the start value of both sums, to which they return
    without observations.
    """

    memory: float = MEMORY
    start: float = TRUSTED
    accepted: float = field(init=False)
    promised: float = field(init=False)

    def __post_init__(self) -> None:
        self.accepted = self.promised = self.start

    @property
    def value(self) -> float:
        return self.accepted / self.promised

    def add(self, accepted: float, promised: float) -> None:
        self.accepted = self.memory * self.accepted + (1 - self.memory) * self.start + accepted
        self.promised = self.memory * self.promised + (1 - self.memory) * self.start + promised
