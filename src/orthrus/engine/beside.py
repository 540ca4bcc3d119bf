"""A second engine over the model of another: for audits and benchmarks, which want a pool of their own."""

from dataclasses import replace
from typing import Any

from orthrus.decoding.prices import Prices
from orthrus.engine.costs import OnMeasure
from orthrus.engine.engine import Engine
from orthrus.model.runner import Runner


class EngineBeside(Engine):
    """An engine with slots and kept pages of its own. What passes cost it takes from `engine`.

    runner: the other engine's unless given; limits: fields of EngineConfig that differ. The other engine must
    not step meanwhile: a runner serves one thread at a time.
    """

    def __init__(self, engine: Engine, runner: Runner | None = None, **limits: Any) -> None:
        super().__init__(runner or engine.runner, replace(engine.config, **limits))
        self._other = engine

    def prices(self, on_measure: OnMeasure | None = None, *, greedy: bool = True) -> Prices:
        """Prices of this engine's own, which start from the other engine's cost table."""
        with self._stepping:
            if greedy not in self._prices:
                self._prices[greedy] = Prices(self._other.costs(on_measure, greedy=greedy))
            return self._prices[greedy]
