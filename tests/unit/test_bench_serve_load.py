"""benchmarks/serve_load.py without a server: its loads, its arms, and what it writes."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.load_server import Served

from orthrus.bench.load import LoadOptions, run_load

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("serve_load")
    for name in ("serve_load", "own_server"):
        sys.modules.pop(name, None)


def run(script: Any, *args: str) -> None:
    typer.main.get_command(script.app).main(list(args), standalone_mode=False)


def test_the_kinds_of_requests(script: Any) -> None:
    asks = script.mixed(40)
    assert [ask.kind for ask in asks[:5]] == [*script.KINDS, "short chat"]
    assert [ask.max_tokens for ask in asks[:4]] == list(script.KINDS.values())
    by_kind = {kind: [ask for ask in asks if ask.kind == kind] for kind in script.KINDS}
    assert len({ask.messages[0]["content"] for ask in by_kind["shared prompt"]}) == 1
    assert all(ask.messages[-1]["role"] == "user" for ask in asks)
    longest = min(len(ask.messages[0]["content"]) for ask in by_kind["long prompt"])
    assert longest > 4 * max(len(ask.messages[0]["content"]) for ask in by_kind["long answer"])
    texts = [ask.messages[-1]["content"] for ask in by_kind["long prompt"][:8]]
    assert len({text[:60] for text in texts}) == 8


def test_both_arms_at_every_load_and_a_rival(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[LoadOptions] = []

    def load(options: LoadOptions, told: Any) -> Any:
        asked.append(options)
        transport = Served(is_orthrus="rival" not in options.url, delay=0.001)
        return run_load(options, told, transport)

    monkeypatch.setattr(script, "run_load", load)
    output = tmp_path / "load.json"
    run(script, "--url", "http://ours", "--rival", "other=http://rival", "--quick", "--output", str(output))
    report = json.loads(output.read_text())
    loads = list(dict.fromkeys(row["level"] for row in report["rows"]))
    assert loads[:2] == ["1 at a time", "4 at a time"]
    rates = [float(load.removesuffix(" a second")) / report["capacity"] for load in loads[2:]]
    assert rates == pytest.approx([0.25, 0.5], rel=1e-3)
    assert [row["arm"] for row in report["rows"]] == ["ar", "auto", "other"] * 4
    assert [row.get("share") for row in report["rows"]] == [None] * 6 + [0.25] * 3 + [0.5] * 3
    assert all(row["num_checked"] == row["num_ok"] > 0 for row in report["rows"])
    assert all(row["to_first_arm"] == 1.0 for row in report["rows"] if row["arm"] == "ar")
    assert report["servers"]["other"]["is_orthrus"] is False
    # All get the same requests at the same times, and no load finds another's prompts in the cache.
    for ours, theirs in zip(asked[::2], asked[1::2], strict=True):
        assert (ours.seed, ours.asks, ours.levels) == (theirs.seed, theirs.asks, theirs.levels)
    assert len({options.seed for options in asked}) == 4
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["num_different"] == 0
    assert len(last["to_ar"]) == 8


def test_a_server_that_does_not_start_is_shown(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own_server = sys.modules["own_server"]
    monkeypatch.setattr(own_server, "_is_ready", lambda url: False)
    monkeypatch.setattr(own_server, "_free_port", lambda: 9)
    with (
        pytest.raises(RuntimeError, match=r"did not start:\nerror: .*--drain"),
        script.served(["--model", "default", "--dtype", "float32", "--drain", "-1"]),
    ):
        pass


@pytest.mark.parametrize("pair", ["x", "=http://a", "x=", "ar=http://a"])
def test_a_rival_needs_a_name_and_an_address(script: Any, pair: str) -> None:
    with pytest.raises(typer.BadParameter):
        run(script, "--url", "http://ours", "--rival", pair)
