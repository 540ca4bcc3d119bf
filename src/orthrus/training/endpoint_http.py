"""Requests to servers that may be busy, slow or gone: retries, pauses, and several servers in turn.

Pauses belong to servers: while one rests, the others get what comes. Only an internal error (500) may be the
fault of one request, so it is that request which waits.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Any

from orthrus.errors import ModelNotFoundError
from orthrus.training.endpoint_reply import Form

if TYPE_CHECKING:
    import httpx

_BUSY, _BROKE = 429, 500
AGAIN = frozenset({408, 409, 425, _BUSY, _BROKE, 502, 503, 504})
"""Statuses of what may succeed later."""
_LONGEST_REST = 600.0
_MOST_LOST = 3


@dataclass(slots=True)
class Server:
    """One server: `url` ends in its version (".../v1"). model and form are known once it was asked."""

    url: str
    model: str = ""
    version: str | None = None
    form: Form | None = None
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0


class RefusedError(Exception):
    """A server's answer that asking again would not change."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """When requests are given up.

    attempts: of one request; first_attempts: to reach any server at all. first_rest: seconds after a server's
    first failure, twice as long after each further one, at most longest_rest; a server that says how long to
    wait is believed.
    """

    attempts: int = 8
    first_attempts: int = 3
    first_rest: float = 1.0
    longest_rest: float = 60.0


class Requests:
    """Sends requests; used within one event loop. key: the servers' API key, which is told to nobody else."""

    def __init__(self, client: "httpx.AsyncClient", key: str | None, patience: Patience) -> None:
        self._client, self._key, self._patience = client, key, patience
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # Of pauses only; no answer hangs on it.
        self._random = Random()
        self._turn = self._num_answered = 0
        # Requests given up since the last answer.
        self._num_lost = 0

    async def get(self, server: Server, url: str, *, final: frozenset[int] = frozenset()) -> Any:
        """A page of a server as JSON; None where it has no such page. Errors and `final` as in `post`."""
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
        """(who answered, JSON) of the first of `servers` that answers; asked(server) gives (path, body).

        final: statuses that are a refusal here, though they may pass elsewhere. Raises RefusedError for an answer
        that asking again would not change, and, while others are answered, for a request that fails wherever it
        goes; ModelNotFoundError when no request is answered any more.
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
                # A server that is busy with the others' requests is not broken.
                if failed.status != _BUSY or not answered:
                    attempts += 1
                # An address that has never answered is most often a wrong one.
                is_new = not (failed.status or self._num_answered)
                if attempts >= (self._patience.first_attempts if is_new else self._patience.attempts):
                    self._num_lost += 1
                    # It may be this one request that a server breaks over.
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
        """The one with the least to do of those that do not rest, in turn; waits while all of them do."""
        while True:
            now = monotonic()
            ready = [s for s in servers if s.rests_until <= now]
            if ready:
                self._turn += 1
                first = self._turn % len(ready)
                return min(ready[first:] + ready[:first], key=lambda server: server.in_flight)
            soonest = min(server.rests_until for server in servers) - now
            # Not all at once.
            await asyncio.sleep(soonest * (1.0 + 0.25 * self._random.random()))

    def _rest(self, server: Server, failed: "_FailedError") -> None:
        now = monotonic()
        if failed.wait is None and server.rests_until > now:
            # Requests that were on their way fail together: that is one failure.
            return
        server.failures += 1
        rest = self._pause(server.failures) if failed.wait is None else min(failed.wait, _LONGEST_REST)
        server.rests_until = max(server.rests_until, now + rest)

    def _pause(self, failures: int) -> float:
        """Seconds after so many failures in a row, not the same for all."""
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
        """Some servers repeat the key that they refuse."""
        return text if self._key is None else text.replace(self._key, "***")


class _FailedError(Exception):
    """A request that may succeed later. status 0: it did not get there."""

    def __init__(self, status: int, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.status, self.wait = status, wait


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header: seconds, or a date."""
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
