"""GET /audit and /audit/{id}: the results of the audit of live traffic."""

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from orthrus.audit.report import LEGEND
from orthrus.server.errors import ApiError
from orthrus.server.service import Service

_EXPLAINED = ("score", "gap", "rounding_spread", "drift", "residue")


def add_audit(app: FastAPI, service: Service) -> None:
    @app.get("/audit", response_model=None)
    async def audit() -> Response:
        """Counts of the audit of live traffic, and the latest answers that differed."""
        return JSONResponse(service.live.audit.summary())

    @app.get("/audit/{id}", response_model=None)
    async def difference(id: str) -> Response:
        """The evidence of one difference: its position, the tokens there, and their scores; no text."""
        found = service.live.audit.evidence(id)
        if found is None:
            raise ApiError(
                404,
                f"The audit keeps no difference {ascii(id)[:40]}: GET /audit lists those that it keeps.",
                code="not_found",
            )
        return JSONResponse(found | {"legend": {word: LEGEND[word] for word in _EXPLAINED}})
