"""The way out of a server whose model is still loading: a process of its own, and a signal."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn
from unittest.mock import Mock

import pytest

from orthrus.errors import UserInputError
from orthrus.server.run import STALLED, address, limit_stalls, serve
from orthrus.server.settings import ServeConfig

SCRIPT = """
import subprocess, sys
import torch
from orthrus.server.run import serve
from orthrus.server.settings import ServeConfig

def load():
    print("loading", flush=True)
    if sys.argv[1] == "compiler":
        # It is ended, and whoever waits for it hears of it.
        code = subprocess.run(["sleep", "60"]).returncode
        print("ended with", code, flush=True)
        raise OSError("the compiler was stopped")
    x = torch.ones(700, 700)
    while True:
        x = (x @ x).clamp(-1, 1)

serve(load, ServeConfig(), "127.0.0.1", 0)
"""


TAKEN = """
import socket
from orthrus.errors import UserInputError
from orthrus.server.run import serve
from orthrus.server.settings import ServeConfig
from tests.server.conftest import byte_orthrus

with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    try:
        serve(byte_orthrus, ServeConfig(), "127.0.0.1", port)
    except UserInputError as error:
        print(str(error).replace(str(port), "PORT"))
"""


def test_a_taken_port_is_told_of_once_with_its_reason() -> None:
    done = subprocess.run([sys.executable, "-c", TAKEN], capture_output=True, text=True, timeout=120)
    assert done.stdout == (
        "cannot listen on 127.0.0.1:PORT (address already in use): choose another --port or --host.\n"
    )
    assert "Errno" not in done.stderr


def test_an_address_stands_as_in_a_url() -> None:
    assert [address(host, 8000) for host in ("127.0.0.1", "::1")] == ["127.0.0.1:8000", "[::1]:8000"]


@pytest.mark.parametrize("busy_with", ["passes", "compiler"])
def test_sigterm_while_loading_ends_the_process_cleanly(busy_with: str, tmp_path: Path) -> None:
    """It used to abort: Python tears threads down in the middle of compiled code."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    server = subprocess.Popen(
        [sys.executable, str(script), busy_with],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "loading\n"
    server.send_signal(signal.SIGTERM)
    out, log = server.communicate(timeout=60)
    assert not re.search("terminate called|Traceback", log), log
    assert server.returncode == 0, log
    assert out == ("" if busy_with == "passes" else "ended with -15\n")


def test_a_host_that_is_no_name_is_refused_before_the_model_is_loaded() -> None:
    def load() -> NoReturn:
        raise AssertionError("loaded")

    with pytest.raises(UserInputError, match=r"'a\.\.b' is no name of a host"):
        serve(load, ServeConfig(), "a..b", 0)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux has it")
def test_the_system_closes_connections_whose_clients_have_stalled() -> None:
    listener = Mock()
    limit_stalls([listener])
    listener.setsockopt.assert_called_once_with(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED * 1000)
