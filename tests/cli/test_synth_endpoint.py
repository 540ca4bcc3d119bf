"""`orthrus synth --endpoint`: a corpus from a server, by command line."""

import builtins
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.training.endpoint_servers import Bridge, served

from orthrus.api import Orthrus
from orthrus.training import endpoint

from .conftest import Cli, assert_refused
from .training_files import SYNTH, write_prompts


@pytest.fixture(scope="module")
def server(model_folder: str) -> Iterator[Bridge]:
    with served(Orthrus.load(model_folder, "untrained", device="cpu")) as bridge:
        yield bridge


@pytest.fixture
def reached(server: Bridge, monkeypatch: pytest.MonkeyPatch) -> Bridge:
    """The server, in place of the network."""
    there = partial(endpoint.EndpointAnswerer, transport=server)
    monkeypatch.setattr(endpoint, "EndpointAnswerer", there)
    return server


def test_a_corpus_from_servers(
    cli: Cli, tmp_path: Path, model_folder: str, reached: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    monkeypatch.setenv("ORTHRUS_API_KEY", "sk-own")
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    common = ("--model", model_folder, "--prompts", prompts, *SYNTH, "--json")
    here = cli("synth", str(tmp_path / "here"), *common)
    asked = ("--endpoint", "http://one,http://two/v1", "--endpoint", "http://three", "--concurrency", "4")
    there = cli("synth", str(tmp_path / "there"), *common, *asked)
    assert there.code == 0, there.err
    report, own = json.loads(there.out), json.loads(here.out)
    assert report["left_out"] == own["left_out"] == {}
    assert {**report, "path": ""} == {**own, "path": ""}
    assert {r.url.host for r in reached.requests} == {"one", "two", "three"}
    assert reached.requests[-1].headers["authorization"] == "Bearer sk-own"
    manifest = (tmp_path / "there" / "manifest.json").read_text()
    assert [s["url"] for s in json.loads(manifest)["servers"]] == [
        f"http://{host}/v1" for host in ("one", "two", "three")
    ]
    assert "sk-" not in manifest
    assert cli("synth", str(tmp_path / "there"), *common, *asked).code == 0
    assert_refused(cli("synth", str(tmp_path / "there"), *common), "begun with other settings (answerer)")


def test_another_model_is_refused_in_one_sentence(
    cli: Cli, tmp_path: Path, model_folder: str, reached: Bridge
) -> None:
    from .conftest import write_model

    other = str(write_model(tmp_path / "other", seed=7))
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    target = tmp_path / "corpus"
    command = ("synth", str(target), "--model", other, "--prompts", prompts, *SYNTH)
    assert_refused(cli(*command, "--endpoint", "http://one"), "http://one/v1 serves another model than other")
    assert not list(target.glob("answers-*"))


def test_endpoints_that_cannot_be(
    cli: Cli, tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    command = ("synth", str(tmp_path / "corpus"), "--model", model_folder, "--prompts", prompts, *SYNTH)
    assert_refused(cli(*command, "--endpoint", "here"), "--endpoint is 'here'; give an address")
    assert_refused(cli(*command, "--endpoint", ","), "no endpoint")
    assert_refused(cli(*command, "--endpoint", "http://one", "--concurrency", "0"), "concurrency")
    assert_refused(cli(*command, "--endpoint-model", "x"), "give --endpoint too")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "httpx":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert_refused(cli(*command, "--endpoint", "http://one"), 'pip install "orthrus-lm[train]"')
    assert not (tmp_path / "corpus").exists()
