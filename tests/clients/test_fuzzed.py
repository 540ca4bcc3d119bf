"""schemathesis makes requests from the OpenAPI document: none may end in an error of the server's."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import KEY

pytest.importorskip("schemathesis")


def test_no_request_breaks_the_server(url):
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        *("run", f"{url}/openapi.json", "--seed", "7", "--max-examples", "25", "--no-color"),
        *("--header", f"Authorization: Bearer {KEY}"),
        *("--checks", "not_a_server_error,status_code_conformance,content_type_conformance"),
        *("--phases", "examples,coverage,fuzzing", "--request-timeout", "120"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
