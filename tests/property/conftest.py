"""What the laws about many requests share."""

import pytest
from tests.unit.test_policy import FLAT, MIDDLE

from orthrus.engine.costs import Costs


@pytest.fixture
def made_up_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs of imaginary machines: rows cost something in greedy decoding, next to nothing in sampled."""
    monkeypatch.setattr(
        "orthrus.engine.engine.pass_costs", lambda *_, **__: Costs(greedy=MIDDLE, sampled=FLAT)
    )
