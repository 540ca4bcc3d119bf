"""Makes the receipt of an answer, if its request asks for one. `orthrus.audit.receipts` defines its content."""

from typing import Any

from orthrus.api import Orthrus
from orthrus.audit.plain import Answered
from orthrus.audit.receipts import make_receipt, model_part
from orthrus.server.calls import Call


class Receipts:
    """Makes the receipts of one model's answers."""

    def __init__(self, orthrus: Orthrus) -> None:
        self._model = model_part(orthrus)

    def __call__(self, call: Call) -> dict[str, Any]:
        """The receipt of a call. All of its answers must have ended."""
        return make_receipt(self._model, [Answered.of(r) for r in call.requests if r is not None])
