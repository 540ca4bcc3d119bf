"""Moving averages: of values (the first observations weigh more), and of the ratio of accepted to promised drafts."""

from dataclasses import dataclass, field

MEMORY = 0.85
"""Weight of the past in a moving average, for each new observation, unless it says otherwise."""
TRUSTED = 2.0
"""How many accepted drafts, all of them promised, a ratio starts from: a few say little about promises."""


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
    """Ratio of accepted to promised drafts, from two moving sums. Both start at the same value, so the ratio
    starts at 1.

    memory: weight of the past, for each new observation. start: what both sums start from.
    """

    memory: float = MEMORY
    start: float = TRUSTED
    came: float = field(init=False)
    promised: float = field(init=False)

    def __post_init__(self) -> None:
        self.came = self.promised = self.start

    @property
    def value(self) -> float:
        return self.came / self.promised

    def add(self, came: float, promised: float) -> None:
        self.came = self.memory * self.came + (1 - self.memory) * self.start + came
        self.promised = self.memory * self.promised + (1 - self.memory) * self.start + promised
