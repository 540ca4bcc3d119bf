"""GET /audit and /audit/{id}: what the audit of live traffic has found."""

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from orthrus.audit.report import LEGEND
from orthrus.server.errors import ApiError
from orthrus.server.service import Service

_EXPLAINED = ("score", "gap", "noise", "drift", "residue")


def add_audit(app: FastAPI, service: Service) -> None:
    @app.get("/audit", response_model=None)
    async def audit() -> Response:
        """Counts of the audit of live traffic, and the latest answers that differed."""
        return JSONResponse(service.live.audit.summary())

    @app.get("/audit/{name}", response_model=None)
    async def difference(name: str) -> Response:
        """The evidence of one difference: where, which tokens, and how near they were; no text."""
        found = service.live.audit.evidence(name)
        if found is None:
            raise ApiError(
                404,
                f"The audit keeps no difference {ascii(name)[:40]}: GET /audit lists those that it keeps.",
                code="not_found",
            )
        return JSONResponse(found | {"legend": {word: LEGEND[word] for word in _EXPLAINED}})
