"""`orthrus serve` as a process beside a benchmark."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import httpx

from orthrus.cli.common import KILLS, handling, leaving

HOST = "127.0.0.1"
LONGEST_START_S = 900.0


@dataclass(frozen=True)
class Server:
    """A server that is ready. start_s: from the start of the command to the first 200 of /ready."""

    port: int
    process: subprocess.Popen[bytes]
    start_s: float

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"


@contextmanager
def served(options: Sequence[str]) -> Iterator[Server]:
    """`orthrus serve` with these options, once it is ready; it is ended afterwards, if it still runs.

    Raises RuntimeError, with the end of its log, when it does not start.
    """
    port = _free_port()
    command = [sys.executable, "-m", "orthrus.cli.app", "serve", "--port", str(port), "--quiet", *options]
    with (
        # As an exception, so that no server is left behind.
        handling(KILLS, _leave),
        tempfile.TemporaryFile() as log,
    ):
        start = time.monotonic()
        with subprocess.Popen(command, stderr=log) as process:
            try:
                while not _is_ready(f"http://{HOST}:{port}"):
                    if process.poll() is not None or time.monotonic() > start + LONGEST_START_S:
                        log.seek(0)
                        said = log.read()[-2000:].decode(errors="replace")
                        raise RuntimeError(f"the server did not start:\n{said}")
                    time.sleep(0.05)
                yield Server(port, process, time.monotonic() - start)
            finally:
                process.terminate()


def _leave(number: int, frame: FrameType | None) -> None:
    raise leaving(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
