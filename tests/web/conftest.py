"""A browser, and tiny servers in processes of their own. `make test-web` runs this.

In the environment, PYTHON_OF_ORTHRUS names an interpreter that has Orthrus, CHROMIUM the browser.
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
PYTHON = os.environ.get("PYTHON_OF_ORTHRUS", str(ROOT / ".venv" / "bin" / "python"))
KEY = "secret"
START_SECONDS = 100
expect.set_options(timeout=30_000)


class Server:
    """A process that serves a tiny model. Starting takes a while: start all of them, then wait for each."""

    def __init__(self, folder: Path, *keys: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", folder / "log"
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        # What it measures of this machine is of no use to anybody else.
        own = {"ORTHRUS_RUNNER": "eager", "ORTHRUS_CACHE": str(folder)}
        path = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                [PYTHON, "-m", "tests.web.tiny_server", str(port), *keys],
                cwd=ROOT,
                env=os.environ | quiet | own | path,
                stdout=out,
                stderr=out,
            )

    def wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while not self._is_ready():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            headers = {"authorization": f"Bearer {KEY}"}
            return httpx.get(f"{self.url}/ready", headers=headers).status_code == 200
        except httpx.TransportError:
            return False

    def leave(self) -> None:
        self._process.terminate()

    def gone(self) -> None:
        assert self._process.wait(60) == 0, self._log.read_text()[-2000:]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """One that asks for no key, and one that asks for KEY."""
    made = [Server(tmp_path_factory.mktemp("open")), Server(tmp_path_factory.mktemp("locked"), KEY)]
    try:
        for server in made:
            server.wait()
        yield made
    finally:
        for server in made:
            server.leave()
        for server in made:
            server.gone()


@pytest.fixture(scope="session")
def url(servers: list[Server]) -> str:
    return servers[0].url


@pytest.fixture(scope="session")
def locked_url(servers: list[Server]) -> str:
    return servers[1].url


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip(f"there is no browser at {CHROMIUM}: install chromium, or name one in CHROMIUM")
    with sync_playwright() as playwright:
        # Containers seldom allow the browser's own sandbox; it opens nothing but our page here.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A fresh page at 1280 x 900, or with the context's options that a test gives as parameters.

    In the end nothing must have gone wrong in it, and nothing been asked of anybody else.
    """
    context = browser.new_context(
        **{"viewport": {"width": 1280, "height": 900}} | getattr(request, "param", {})
    )
    page = context.new_page()
    wrong: list[str] = []
    hosts: set[str] = set()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
    page.on("request", lambda asked: hosts.add(httpx.URL(asked.url).host))
    yield page
    context.close()
    # The browser itself says this of each refused request.
    assert [each for each in wrong if "Failed to load resource" not in each] == []
    assert hosts - {""} == {"127.0.0.1"}
