"""demo, convert, env, bench and audit on the tiny model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, Qwen3Config

from orthrus.api import Orthrus
from orthrus.cli import demo as demo_module
from orthrus.cli.app import app
from orthrus.config import FIXED_STRATEGIES

from .conftest import Cli, assert_refused, write_model

DEMO = ("--view", "untrained", "-n", "12")


def test_demo_compares_and_sums_up(cli: Cli, model_folder: str) -> None:
    run = cli("demo", "--model", model_folder, *DEMO)
    assert run.code == 0
    assert run.out.count("SAME TOKENS") == 3
    for words in (
        "three times",
        "transformers",
        "not trained yet",
        "LOSSLESS",
        "math",
        "code",
        "chat",
        "passes",
        "seconds",
    ):
        assert words in run.out
    # Three commands that can be typed as they stand.
    *_, first, second, third = run.out.rstrip().splitlines()
    for line, name in ((first, "chat"), (second, "bench"), (third, "serve")):
        program, command, folder, *_ = line.split()
        assert (Path(program).name, command, folder) == (Path(program).name, name, model_folder)
        assert command in typer.main.get_command(app).commands


def test_demo_json(cli: Cli, model_folder: str) -> None:
    run = cli("demo", "--model", model_folder, *DEMO, "--json")
    result = json.loads(run.out)
    assert result["same_tokens"] is True
    assert result["view_trained"] is False
    assert [p["domain"] for p in result["prompts"]] == ["math", "code", "chat"]
    for prompt in result["prompts"]:
        assert prompt["stock"]["token_ids"] == prompt["ar"]["token_ids"] == prompt["auto"]["token_ids"]
        # One pass a token: the prompt's gives the first.
        assert (
            prompt["stock"]["num_passes"] == len(prompt["stock"]["token_ids"]) == prompt["ar"]["num_passes"]
        )
        assert prompt["stock"]["seconds"] > 0
        assert prompt["first_differences"] == {}
        assert prompt["ar"]["num_drafted"] == 0


def test_demo_fails_loudly_when_a_token_differs(
    cli: Cli, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = demo_module._decode
    asked: list[str] = []

    def wrong(orthrus: Any, prompt_ids: Any, strategy: str, *rest: Any, **options: Any) -> Any:
        result = decode(orthrus, prompt_ids, strategy, *rest, **options)
        asked.append(strategy)
        if strategy == "auto" and asked.count("auto") % 3 == 2:
            return dataclasses.replace(result, token_ids=(*result.token_ids[:-1], 5))
        return result

    monkeypatch.setattr(demo_module, "_decode", wrong)
    run = cli("demo", "--model", model_folder, *DEMO)
    assert run.code == 1
    assert "DIFFERENT TOKENS" in run.out
    assert "NOT LOSSLESS" in run.out
    assert cli("demo", "--model", model_folder, *DEMO, "--json").code == 1


def test_demo_tells_another_token_of_transformers_from_a_fault_of_ours(
    cli: Cli, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = demo_module._stock

    def other(*arguments: Any) -> Any:
        answer = stock(*arguments)
        return dataclasses.replace(answer, token_ids=(*answer.token_ids[:-1], 5))

    monkeypatch.setattr(demo_module, "_stock", other)
    run = cli("demo", "--model", model_folder, *DEMO)
    assert run.code == 1
    assert "transformers differs" in run.out
    assert "orthrus audit" in run.out
    assert "NOT LOSSLESS" not in run.out


@pytest.mark.parametrize("layout", ["view", "merged"])
def test_convert_writes_what_loads_again(cli: Cli, model_folder: str, tmp_path: Path, layout: str) -> None:
    target = tmp_path / "out"
    run = cli("convert", model_folder, str(target), "--to", layout, "--block-size", "5")
    assert run.code == 0
    assert "parameters added" in run.out
    assert "%" in run.out
    assert "bit for bit" in run.out
    assert "warning" not in run.err
    assert "it/s" not in run.err
    assert (target / "README.md").is_file()
    source = (model_folder, str(target)) if layout == "view" else (str(target), "default")
    orthrus = Orthrus.load(source[0], view=source[1])
    assert orthrus.dual.config.block_size == 5
    if layout == "merged":
        assert (target / "generation_config.json").is_file()
        original = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
        stock = orthrus.stock()
        for name, tensor in stock.state_dict().items():
            assert torch.equal(tensor, original[name])


def test_convert_merged_back_to_a_view(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    assert cli("convert", model_folder, str(tmp_path / "merged"), "--to", "merged").code == 0
    run = cli("convert", str(tmp_path / "merged"), str(tmp_path / "view"), "--json")
    report = json.loads(run.out)
    assert report["layout"] == "view"
    assert report["ar_logits_unchanged"] is True
    assert report["added_parameters"] > 0
    assert 0 < report["added_fraction"] < 1


def test_convert_to_the_released_layout(cli: Cli, tmp_path: Path) -> None:
    source = write_model(tmp_path / "qwen3", config_class=Qwen3Config)
    run = cli("convert", str(source), str(tmp_path / "out"), "--to", "released")
    assert run.code == 0, run.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["OrthrusLM"]
    assert config["block_size"] == 8
    assert (tmp_path / "out" / "generation_config.json").is_file()
    # A released view counts as trained, so its block size is a fact.
    assert_refused(
        cli("convert", str(tmp_path / "out"), str(tmp_path / "v"), "-k", "4"), "trained with block size 8"
    )


def test_convert_refusals(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    assert_refused(cli("convert", model_folder, str(tmp_path)), "exists already")
    new = str(tmp_path / "new")
    assert_refused(cli("convert", model_folder, new, "--block-size", "1"), "at least 2")
    assert_refused(cli("convert", model_folder, new, "--block-size", "999"), "999")
    assert_refused(cli("convert", model_folder, new, "--to", "released"), "Qwen3")
    assert_refused(cli("convert", model_folder, new, "--to", "other"), "released")
    assert_refused(cli("convert", str(tmp_path / "absent"), new), "absent")
    assert_refused(cli("convert", model_folder), "OUT")
    assert not Path(new).exists()
    assert list(tmp_path.iterdir()) == []


def test_env_reports_what_a_bug_report_needs(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path))
    facts = json.loads(cli("env", "--json").out)
    assert facts["torch"] == torch.__version__
    assert facts["cache"] == str(tmp_path)
    assert facts["default_model_cached"] is False
    text = cli("env").out
    for name in facts:
        assert name in text


def test_bench_options_are_checked_before_anything_loads(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    for command in ("bench", "audit"):
        assert_refused(cli(command, model_folder, "--strategy", "beam"), "beam", "chain")
        assert_refused(cli(command, model_folder, "--max-new-tokens", "0"), "max_new_tokens")
        assert_refused(cli(command, model_folder, "--format", "xml"), "xml")
        assert_refused(
            cli(command, model_folder, "--prompts", str(tmp_path / "absent.jsonl")), "absent.jsonl"
        )
        assert_refused(cli(command, model_folder, "--limit", "0"), "limit")
    assert_refused(cli("bench", "compare", "a.json"), "B.json")
    assert_refused(
        cli("bench", "compare", "nowhere.json", "b.json"), "nowhere.json cannot be read (No such file"
    )
    assert_refused(cli("audit", model_folder, "--against", "beam"), "--against", "beam", "stock", "plain")


SHORT = ("--view", "untrained", "--limit", "1", "--domain", "math", "--max-new-tokens", "8")


def test_bench_prints_and_saves(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    run = cli("bench", model_folder, *SHORT, "--repeats", "1", "-o", str(file), "--format", "md")
    assert run.code == 0
    assert "|" in run.out
    saved = json.loads(file.read_text())
    assert (
        json.loads(cli("bench", model_folder, *SHORT, "--repeats", "1", "--json").out).keys() == saved.keys()
    )
    compared = cli("bench", "compare", str(file), str(file))
    assert compared.code == 0
    assert compared.out.strip()


def test_audit_verdict_is_the_exit_status(
    cli: Cli, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orthrus import audit

    run = cli("audit", model_folder, *SHORT)
    assert run.code == 0
    assert all(strategy in run.out for strategy in FIXED_STRATEGIES)
    budgets = ("--node-budget", "4", "--block-budget", "1", "--strategy", "fused_tree")
    sampled = cli("audit", model_folder, *SHORT, *budgets, "-t", "1", "--seed", "3", "--json")
    assert sampled.code == 0
    saved = json.loads(sampled.out)
    assert saved["provenance"]["seed"] == 3
    assert (saved["options"]["temperature"], saved["options"]["node_budget"]) == (1.0, 4)
    assert [s["num_identical"] for s in saved["strategies"]] == [1]
    assert saved["options"]["against"] == "stock"
    plain = cli("audit", model_folder, *SHORT, "--strategy", "chain", "--against", "plain", "--format", "md")
    assert plain.code == 0
    assert "identical to plain decoding by the eager runner" in plain.out
    honest = audit.run_audit

    class Failed:
        passed = False

        def __init__(self, report: Any) -> None:
            self._report = report

        def __getattr__(self, name: str) -> Any:
            return getattr(self._report, name)

    monkeypatch.setattr(audit, "run_audit", lambda *args: Failed(honest(*args)))
    assert cli("audit", model_folder, *SHORT, "--json").code == 1
