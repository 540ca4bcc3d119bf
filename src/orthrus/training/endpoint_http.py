"""Sends requests to servers that may be busy, slow or gone: with retries, pauses, and several servers in turn.

Pauses belong to servers: while one rests, the others get the requests. Only an internal error (500) may be caused by
one request, so then only that request waits.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Any

from orthrus.base.web_client import key_header
from orthrus.errors import ModelNotFoundError
from orthrus.training.endpoint_reply import Form

if TYPE_CHECKING:
    import httpx

_BUSY, _BROKE = 429, 500
AGAIN = frozenset({408, 409, 425, _BUSY, _BROKE, 502, 503, 504})
"""Statuses after which a request may succeed later."""
_LONGEST_REST = 600.0
_MOST_LOST = 3


@dataclass(slots=True)
class Server:
    """One server. `url` ends in the API's version (".../v1"). model and form are known after the first contact."""

    url: str
    model: str = ""
    version: str | None = None
    form: Form | None = None
    in_flight: int = 0
    failures: int = 0
    """Successive failures."""
    rests_until: float = 0.0


class RefusedError(Exception):
    """A refusal that a retry would not change."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Limits of retries.

    attempts: of one request. first_attempts: to reach servers of which none has answered yet. first_rest: pause in
    seconds after a server's first failure, doubled after each further one up to longest_rest. A wait time that a server
    itself states takes precedence.
    """

    attempts: int = 8
    first_attempts: int = 3
    first_rest: float = 1.0
    longest_rest: float = 60.0


class Requests:
    """Sends requests within one event loop. key: the servers' API key, which only they get."""

    def __init__(self, client: "httpx.AsyncClient", key: str | None, patience: Patience) -> None:
        self._client, self._key, self._patience = client, key, patience
        self._headers = key_header(key)
        # Only for pauses. No answer depends on it.
        self._random = Random()
        self._turn = self._num_answered = 0
        # Number of failed requests since the last answer.
        self._num_lost = 0

    async def get(self, server: Server, url: str, *, final: frozenset[int] = frozenset()) -> Any:
        """A page of a server as JSON; None if it has no such page. Errors and `final` as in `post`."""
        try:
            return (await self._sent([server], lambda _: ("GET", url, None), final))[1]
        except RefusedError as refused:
            if refused.status in (401, 403):
                raise
            return None

    async def post(
        self,
        servers: Sequence[Server],
        asked: Callable[[Server], tuple[str, Any]],
        *,
        final: frozenset[int] = frozenset(),
    ) -> tuple[Server, Any]:
        """(server, JSON) of the first of `servers` that answers. asked(server) gives (path, body).

        final: statuses that count as refusals here, although a retry is usual. Raises RefusedError for a refusal that a
        retry would not change, and for a request that always fails while others are answered. Raises ModelNotFoundError
        if no request is answered any more.
        """

        def request(server: Server) -> tuple[str, str, Any]:
            path, body = asked(server)
            return "POST", server.url + path, body

        return await self._sent(servers, request, final)

    async def _sent(
        self,
        servers: Sequence[Server],
        request: Callable[[Server], tuple[str, str, Any]],
        final: frozenset[int],
    ) -> tuple[Server, Any]:
        attempts, answered_before = 0, self._num_answered
        while True:
            server = await self._next(servers)
            server.in_flight += 1
            try:
                reply = await self._once(*request(server))
            except _FailedError as failed:
                if failed.status in final:
                    raise RefusedError(failed.status, str(failed)) from None
                answered = self._num_answered > answered_before
                answered_before = self._num_answered
                # A server that is busy with other requests is not broken.
                if failed.status != _BUSY or not answered:
                    attempts += 1
                # An address that has never answered is usually wrong.
                is_new = not (failed.status or self._num_answered)
                if attempts >= (self._patience.first_attempts if is_new else self._patience.attempts):
                    self._num_lost += 1
                    # This one request may be the cause of the server's error.
                    if answered or (failed.status == _BROKE and self._num_lost < _MOST_LOST):
                        raise RefusedError(failed.status, f"no answer ({failed})") from None
                    raise ModelNotFoundError(
                        f"{server.url} gives no answer after {attempts} attempts ({failed}); what is done is "
                        "kept: see to the server, and run the same command again."
                    ) from None
                if failed.status == _BROKE and failed.wait is None:
                    await asyncio.sleep(self._pause(attempts))
                else:
                    self._rest(server, failed)
            else:
                server.failures = 0
                self._num_answered, self._num_lost = self._num_answered + 1, 0
                return server, reply
            finally:
                server.in_flight -= 1

    async def _next(self, servers: Sequence[Server]) -> Server:
        """The server with the fewest open requests among those that do not rest. Waits while all of them rest."""
        while True:
            now = monotonic()
            ready = [s for s in servers if s.rests_until <= now]
            if ready:
                self._turn += 1
                first = self._turn % len(ready)
                return min(ready[first:] + ready[:first], key=lambda server: server.in_flight)
            soonest = min(server.rests_until for server in servers) - now
            # Random times, so that not all requests start together.
            await asyncio.sleep(soonest * (1.0 + 0.25 * self._random.random()))

    def _rest(self, server: Server, failed: "_FailedError") -> None:
        now = monotonic()
        if failed.wait is None and server.rests_until > now:
            # Open requests fail together, which counts as one failure.
            return
        server.failures += 1
        rest = self._pause(server.failures) if failed.wait is None else min(failed.wait, _LONGEST_REST)
        server.rests_until = max(server.rests_until, now + rest)

    def _pause(self, failures: int) -> float:
        """A random pause in seconds after so many successive failures."""
        patience = self._patience
        longest = min(patience.longest_rest, patience.first_rest * 2.0 ** min(failures - 1, 30))
        return longest * (0.5 + 0.5 * self._random.random())

    async def _once(self, method: str, url: str, body: Any) -> Any:
        import httpx

        try:
            response = await self._client.request(method, url, json=body, headers=self._headers)
        except httpx.TransportError as e:
            raise _FailedError(0, self._hidden(str(e)) or type(e).__name__) from None
        except (httpx.InvalidURL, httpx.HTTPError) as e:
            raise RefusedError(0, self._hidden(str(e)) or type(e).__name__) from None
        if response.status_code in AGAIN:
            wait = _seconds(response.headers.get("retry-after"))
            raise _FailedError(response.status_code, self._said(response), wait)
        if not response.is_success:
            raise RefusedError(response.status_code, self._said(response))
        try:
            return response.json()
        except ValueError:
            raise _FailedError(response.status_code, "its reply is no JSON") from None

    def _said(self, response: "httpx.Response") -> str:
        """Status and message of an error, in one short line."""
        try:
            content = response.json()
            error = content.get("error", content)
            message = error.get("message", error) if isinstance(error, dict) else error
        except (ValueError, AttributeError):
            message = ""
        words = " ".join(self._hidden(str(message)).split())[:200].rstrip(".")
        return f"status {response.status_code}" + (f": {words}" if words else "")

    def _hidden(self, text: str) -> str:
        """The text without the key, because some servers repeat the key that they refuse."""
        return text if self._key is None else text.replace(self._key, "***")


class _FailedError(Exception):
    """A request that may succeed later. status 0: it did not reach the server."""

    def __init__(self, status: int, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.status, self.wait = status, wait


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after)) if retry_after.strip()[:1].isdigit() else _until(retry_after)
    except (ValueError, TypeError, OverflowError):
        return None


def _until(date: str) -> float:
    moment = parsedate_to_datetime(date)
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
