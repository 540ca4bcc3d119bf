"""Runs the application on a socket: signals, drain and exit."""

import asyncio
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import psutil
import uvicorn
from fastapi import FastAPI

from orthrus.api import Orthrus
from orthrus.errors import UserInputError
from orthrus.server.app import create_app
from orthrus.server.logs import BindErrors, log_to_stderr
from orthrus.server.settings import ServeConfig

LAST_WORDS = 5
"""Seconds that connections get to send their last bytes after the last answer has ended."""
STALLED = 60
"""Seconds after which the system closes a connection whose client takes no bytes."""
CLEANING = 2
"""Seconds that threads get to clean up after their compilers have been ended."""


def address(host: str, port: int) -> str:
    """The address in the form of a URL: an IPv6 address is in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve(load: Callable[[], Orthrus], config: ServeConfig, host: str, port: int) -> None:
    """Serve until a signal. The first SIGTERM or Ctrl-C drains, the second one ends at once.

    If one of our threads is busy at the end, such as while the model is loading, the process ends here with status 0.
    Raises what `load` raises, and UserInputError for an address on which the server cannot listen.
    """
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise UserInputError(f"{host!r:.100} is no name of a host; choose another --host.") from error
    log_to_stderr()
    app = create_app(load, config)
    server = _Server(app, config, host, port)
    service = app.state.service
    service.on_failure = server.stop
    binding = BindErrors()
    logging.getLogger("uvicorn.error").addFilter(binding)
    try:
        asyncio.run(server.serve())
    except SystemExit as leaving:
        # uvicorn raises it if it cannot listen.
        if leaving.code and binding.reason is not None:
            raise UserInputError(
                f"cannot listen on {address(host, port)} ({binding.reason}): choose another --port or --host."
            ) from leaving
        if leaving.code:
            raise
    finally:
        logging.getLogger("uvicorn.error").removeFilter(binding)
    _end_busy_threads()
    if service.failure is not None:
        raise service.failure


def limit_stalls(listeners: Iterable[Any]) -> None:
    """Let the system close connections whose clients have stalled. They have the options of their listener."""
    # Only Linux has this option.
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    for listener in listeners if option is not None else ():
        listener.setsockopt(socket.IPPROTO_TCP, option, STALLED * 1000)


def _end_busy_threads() -> None:
    """Wait for our threads to end, and otherwise end the process: Python's own exit aborts inside compiled code."""
    busy = [
        thread for thread in threading.enumerate() if thread.daemon and thread.name.startswith("orthrus-")
    ]
    if not busy:
        return
    for compiler in psutil.Process().children(recursive=True):
        compiler.terminate()
    for thread in busy:
        thread.join(CLEANING / len(busy))
    if any(thread.is_alive() for thread in busy):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _Server(uvicorn.Server):
    """uvicorn with a drain: after a signal it refuses new requests, and lets running answers end."""

    def __init__(self, app: FastAPI, config: ServeConfig, host: str, port: int) -> None:
        options: dict[str, Any] = {
            "host": host,
            "port": port,
            "log_config": None,
            "access_log": False,
            "server_header": False,
            "lifespan": "on",
            "timeout_graceful_shutdown": LAST_WORDS,
        }
        super().__init__(uvicorn.Config(app, **options))
        self._service = app.state.service
        self._drain_seconds = config.drain
        self._num_signals = 0
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[Any] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        limit_stalls([each for server in getattr(self, "servers", ()) for each in server.sockets])

    def stop(self) -> None:
        """Leave as soon as connections have closed."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler."""
        self._num_signals += 1
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._signalled, self._num_signals)

    def _signalled(self, number: int) -> None:
        if number == 1:
            self._draining = asyncio.ensure_future(self._drain())
        else:
            self._service.end_all()
            self.stop()

    async def _drain(self) -> None:
        try:
            await self._service.drain(self._drain_seconds)
        finally:
            self.stop()
