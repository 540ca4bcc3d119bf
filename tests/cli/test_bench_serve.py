"""`orthrus bench serve`: options, output and exit status."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.load_server import Served

from orthrus.bench import load

from .conftest import Cli, assert_refused

SHORT = ("--requests", "4", "--max-tokens", "5", "--max-tokens", "8", "--warmup", "0")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """Whatever address is given, this answers."""
    made = Served(ids=lambda body, number: [1, 2, 3 + (number == 2 and "differ" in str(body))])
    monkeypatch.setattr(load, "run_load", partial(load.run_load, transport=made))
    return made


def test_a_table_and_a_file(cli: Cli, served: Served, tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    picks = ("--strategy", "auto", "--strategy", "ar", "--rate", "900", "--concurrency", "2")
    run = cli("bench", "serve", *SHORT, *picks, "--output", str(output), "--ttft-limit", "1000")
    assert run.code == 0, run.err
    assert run.out.count("Serving Benchmark Result") == 4
    report: dict[str, Any] = json.loads(output.read_text())
    assert [(row["level"], row["arm"]) for row in report["rows"]] == [
        (level, arm) for level in ("2 at a time", "900 a second") for arm in ("ar", "auto")
    ]
    assert report["options"]["max_tokens"] == [5, 8]
    assert all(row["goodput"] > 0 for row in report["rows"])
    assert {"ttft_ms", "goodput", "num_different"} <= report["legend"].keys()


def test_left_out_options(cli: Cli, served: Served) -> None:
    run = cli("bench", "serve", "--requests", "2", "--json")
    report = json.loads(run.out)
    assert [row["level"] for row in report["rows"]] == ["1 at a time", "8 at a time"]
    assert not any("orthrus" in body for body in served.bodies[: 1 + 2 + 4])
    assert report["options"]["max_tokens"] == [64]


def test_a_difference_is_exit_status_one(cli: Cli, served: Served, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "differ"}) + "\n")
    run = cli("bench", "serve", *SHORT, "--prompts", str(prompts), "--concurrency", "1", "--format", "md")
    assert run.code == 1
    assert "1 of 4 answers differ" in run.out
    assert cli("bench", "serve", *SHORT, "--no-check", "--prompts", str(prompts)).code == 0


def test_the_key_of_the_environment_is_sent(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "run_load", partial(load.run_load, transport=Served(key="hidden")))
    assert_refused(cli("bench", "serve", *SHORT), "--api-key")
    monkeypatch.setenv("ORTHRUS_API_KEY", "hidden")
    assert cli("bench", "serve", *SHORT, "--format", "csv").code == 0


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--url", "nowhere"], "http://127.0.0.1:8000"),
        (["--strategy", "fast"], "fast"),
        (["--rate", "0"], "rate"),
        (["--rate", "2", "--rate", "2"], "twice"),
        (["--prompts", "nofile.jsonl"], "nofile.jsonl"),
        (["--output", "/"], "/"),
    ],
)
def test_wrong_options_are_refused(cli: Cli, served: Served, args: list[str], told: str) -> None:
    assert_refused(cli("bench", "serve", *args), told)
    assert served.bodies == []


def test_a_missing_package_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert_refused(cli("bench", "serve"), 'pip install "orthrus-lm[serve]"')


def test_bench_still_takes_a_model(cli: Cli) -> None:
    assert_refused(cli("bench", "no/such/folder", "--strategies", "--strategy", "ar"), "not both")
