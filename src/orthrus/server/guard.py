"""The middleware before all routes: request ids, keys, limits on bodies, the log, and the last error handler."""

import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orthrus.server.errors import ApiError, as_api_error
from orthrus.server.settings import ServeConfig

log = logging.getLogger("orthrus.server")
CLIENT_GONE = 499
OPEN_PATHS = ("/", "/health")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")


class Guard:
    """ASGI middleware. on_response: called with the status of each response."""

    def __init__(self, app: ASGIApp, config: ServeConfig, on_response: Callable[[int], None]) -> None:
        self._app, self._config, self._on_response = app, config, on_response
        self._keys = [key.encode() for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers, start = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            self._check_origin(headers)
            self._check_host(scope["path"], headers)
            await self._app(scope, self._bounded(headers, receive), send_with_id)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.error("a request failed", exc_info=error, extra={"data": {"id": request_id}})
            if status == 0:
                await respond(as_api_error(error), scope["path"], send_with_id)
        finally:
            status = status or CLIENT_GONE
            self._on_response(status)
            log.info(
                "request",
                extra={
                    "data": {
                        "id": request_id,
                        "method": scope["method"],
                        "path": scope["path"][:200],
                        "status": status,
                        "ms": round((time.perf_counter() - start) * 1e3, 1),
                    }
                },
            )

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._keys or path in OPEN_PATHS:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = (key.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")).encode()
        # Comparing with all keys keeps the time from showing which one was close.
        if sum(hmac.compare_digest(given, known) for known in self._keys) == 0:
            raise ApiError(
                401,
                "A valid API key is needed: send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
            )

    def _check_origin(self, headers: Headers) -> None:
        """Without keys, refuse pages from other hosts."""
        origin = headers.get("origin")
        if self._keys or origin is None or origin in self._config.cors_origins:
            return
        if not _is_local(_host(origin)):
            raise ApiError(
                403,
                f"Pages of {ascii(origin)[:120]} may not use this server: allow them with --cors-origin, or set "
                "--api-key.",
                code="origin_not_allowed",
            )

    def _check_host(self, path: str, headers: Headers) -> None:
        """Without keys, a local server refuses other host names: DNS rebinding can point a page's name to this machine,
        and the page then sends no origin.
        """
        if self._keys or not self._config.local or path == "/health":
            return
        host = _host(f"//{headers.get('host', '')}")
        if host and not _is_local(host) and host not in map(_host, self._config.cors_origins):
            raise ApiError(
                403,
                f"This server is only for this machine, and {ascii(host)[:120]} is not a name of it: use its "
                "address, allow the name with --cors-origin, or set --api-key.",
                code="host_not_allowed",
            )

    def _bounded(self, headers: Headers, receive: Receive) -> Receive:
        """A `receive` that raises as soon as the body is known to be too large."""
        limit = self._config.max_body
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise _too_large(limit)
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > limit:
                    # FastAPI lets only HTTPException pass while it reads the body.
                    raise HTTPException(413, _too_large(limit).message)
            return message

        return bounded


async def respond(error: ApiError, path: str, send: Send) -> None:
    """Send an error as a whole response to a request for that path."""
    headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    payload = error.payload(path)
    headers.append((b"content-length", str(len(payload)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": payload})


def _host(url: str) -> str:
    """The host of an origin, without its port; empty if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_local(host: str) -> bool:
    """Whether a host can only be this machine or a literal address, so that DNS cannot make it lead elsewhere."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes: send less.", code="request_too_large")
