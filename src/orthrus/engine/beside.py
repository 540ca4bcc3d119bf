"""A second engine over the model of another one, for audits and benchmarks, which need a pool of their own."""

from dataclasses import replace
from typing import Any

from orthrus.engine.costs import Costs, OnMeasure
from orthrus.engine.engine import Engine
from orthrus.model.runner import Runner


class EngineBeside(Engine):
    """An engine with its own slots and kept pages. It takes the cost table from `engine`.

    runner: by default the other engine's. limits: fields of EngineConfig that differ. The passes of both exclude each
    other, because a runner serves one thread at a time.
    """

    def __init__(self, engine: Engine, runner: Runner | None = None, **limits: Any) -> None:
        super().__init__(runner or engine.runner, replace(engine.config, **limits))
        self._other = engine
        self._stepping = engine._stepping

    def _timed(self, on_measure: OnMeasure | None) -> Costs:
        """The cost table of the other engine."""
        return self._other.costs(on_measure)
