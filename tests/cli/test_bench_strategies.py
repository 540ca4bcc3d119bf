"""`orthrus bench` with strategies and temperatures on the tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest

from orthrus import bench
from orthrus.bench.runner import BenchOptions
from orthrus.config import STRATEGIES, DecodeConfig
from orthrus.errors import UserInputError

from .conftest import Cli, assert_refused

SHORT = ("--view", "untrained", "--max-new-tokens", "6", "--repeats", "1", "--warmup", "0")


def test_temperatures_and_strategies_in_one_report(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": d * 3, "domain": d}) + "\n" for d in ("math", "chat")))
    picks = ("--strategy", "tree", "--strategy", "fused", "-t", "0", "-t", "1", "-t", "0")
    run = cli("bench", model_folder, *SHORT, *picks, "--prompts", str(prompts), "--json")
    assert run.code == 0
    report = json.loads(run.out)
    assert report["options"]["temperatures"] == [0.0, 1.0]
    assert report["options"]["arms"] == ["stock", "ar", "tree", "fused"]
    assert report["options"]["prompts_digest"].startswith("blake2b:")
    domains = ("all", "math", "chat")
    assert [(row["temperature"], row["domain"], row["arm"]) for row in report["rows"]] == [
        (t, domain, arm) for t in (0.0, 1.0) for domain in domains for arm in report["options"]["arms"]
    ]
    for row in report["rows"]:
        compared = row["temperature"] == 0.0 or row["arm"] != "stock"
        assert row["equal_to_plain"] == ([row["prompts"]] * 2 if compared else None)
    assert [(line["temperature"], line["arm"]) for line in report["summaries"]] == [
        (t, arm) for t in (0.0, 1.0) for arm in ("ar", "tree", "fused")
    ]


def test_without_a_choice_it_measures_the_default(cli: Cli, model_folder: str) -> None:
    run = cli("bench", model_folder, *SHORT, "--domain", "math", "--limit", "1", "--json")
    assert json.loads(run.out)["options"]["strategies"] == [DecodeConfig().strategy]


def test_all_means_all(cli: Cli, model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[BenchOptions] = []

    def seen(orthrus: Any, options: BenchOptions, on_progress: Any, **_: Any) -> Any:
        asked.append(options)
        raise UserInputError("seen")

    monkeypatch.setattr(bench, "run_bench", seen)
    budgets = ("--node-budget", "5", "--block-budget", "2")
    assert_refused(cli("bench", model_folder, *SHORT, "--strategies", *budgets), "seen")
    assert asked[0].strategies == STRATEGIES
    assert (asked[0].node_budget, asked[0].block_budget) == (5, 2)


def test_all_and_some_exclude_each_other(cli: Cli, model_folder: str) -> None:
    assert_refused(cli("bench", model_folder, "--strategies", "--strategy", "ar"), "--strategies", "not both")
    assert_refused(cli("bench", model_folder, "-t", "0", "-t", "-1"), "temperature")
