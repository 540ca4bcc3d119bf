"""The load driver against our own server, over a socket file: streams as clients see them."""

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from orthrus.api import Orthrus
from orthrus.base.bench_prompts import BenchPrompt
from orthrus.bench.load import LoadOptions, run_load
from orthrus.bench.load_client import asks_of
from orthrus.bench.load_runs import Level
from orthrus.server.app import create_app
from orthrus.server.settings import ServeConfig


@pytest.fixture(scope="module")
def socket_file(orthrus: Orthrus) -> Iterator[str]:
    app = create_app(lambda: orthrus, ServeConfig(max_running=4, max_queue=2, api_keys=("k",)))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "s")
        server = uvicorn.Server(uvicorn.Config(app, uds=path, log_config=None, lifespan="on"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not (server.started and app.state.service.loaded.is_set()):
            assert thread.is_alive()
            time.sleep(0.01)
        yield path
        server.should_exit = True
        thread.join(60)


def measure(path: str, levels: list[Level], **options: Any) -> Any:
    prompts = [BenchPrompt(text) for text in ("Hi", "a b c d", "to be or not")]
    settings = {"asks": asks_of(prompts, 8, [6, 12]), "levels": levels, "ignore_eos": True, "api_key": "k"}
    return run_load(
        LoadOptions(url="http://test", **settings | options), transport=httpx.AsyncHTTPTransport(uds=path)
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_load_changes_no_answer(socket_file: str, temperature: float) -> None:
    levels = [Level(concurrency=4), Level(rate=200.0)]
    report = measure(socket_file, levels, strategies=["ar", "auto", "chain"], temperature=temperature)
    assert len(report.rows) == 6
    for row in report.rows:
        assert row["num_ok"] + row["num_refused"] == 8
        assert (row["num_failed"], row["num_different"]) == (0, 0)
        assert row["num_checked"] == row["num_ok"] > 0
        assert row["ttft_ms"]["median"] <= row["e2e_ms"]["median"]
    chain = report.rows[2]
    assert chain["arm"] == "chain"
    assert chain["output_tokens"] == 4 * 6 + 4 * 12
    assert chain["acceptance_length"] > 1.0
    assert chain["tokens_per_forward"] > 1.0


def test_more_than_there_are_places_for_is_refused_and_counted(socket_file: str) -> None:
    report = measure(socket_file, [Level(concurrency=8)], check=False, warmup=0)
    (row,) = report.rows
    assert row["num_refused"] > 0
    assert row["num_ok"] + row["num_refused"] == 8
    assert report.options["check"] == "off"
