"""A running server with the default model, for the clients that people use.

Run by `make test-clients`; ORTHRUS in the environment names the command that serves.
"""

import os
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

KEY, MODEL = "test-key", "smol"
START_SECONDS = 240
ROOT = Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def url(tmp_path_factory):
    """Where the server answers, without /v1."""
    port = free_port()
    command = [os.environ.get("ORTHRUS", str(ROOT / ".venv" / "bin" / "orthrus")), "serve"]
    command += [
        "--port",
        str(port),
        "--api-key",
        KEY,
        "--name",
        MODEL,
        "--max-tokens",
        "256",
        "--dtype",
        "int8",
    ]
    log_file = tmp_path_factory.mktemp("server") / "log"
    with log_file.open("wb") as log:
        server = subprocess.Popen(command, stderr=log, stdout=log)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while not is_ready(address):
            assert server.poll() is None, log_file.read_text()
            assert time.monotonic() < end, log_file.read_text()
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        assert server.wait(60) == 0, log_file.read_text()[-2000:]


def is_ready(address):
    try:
        return httpx.get(f"{address}/ready", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    except httpx.TransportError:
        return False


WEATHER = {
    "name": "weather",
    "description": "Tells the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
QUESTION = "How is the weather in Paris?"
