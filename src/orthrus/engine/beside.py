"""A second engine over the model of another: for audits and benchmarks, which want a pool of their own."""

from dataclasses import replace
from typing import Any

from orthrus.engine.costs import Costs, OnMeasure
from orthrus.engine.engine import Engine
from orthrus.model.runner import Runner


class EngineBeside(Engine):
    """An engine with slots and kept pages of its own. What passes cost it takes from `engine`.

    runner: the other engine's unless given; limits: fields of EngineConfig that differ. Passes of both wait for
    each other: a runner serves one thread at a time.
    """

    def __init__(self, engine: Engine, runner: Runner | None = None, **limits: Any) -> None:
        super().__init__(runner or engine.runner, replace(engine.config, **limits))
        self._other = engine
        self._stepping = engine._stepping

    def _timed(self, on_measure: OnMeasure | None) -> Costs:
        """The other engine's: this machine has been timed."""
        return self._other.costs(on_measure)
