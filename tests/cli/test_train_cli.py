"""`orthrus synth` and `orthrus train` on the tiny model: a view from nothing, and resuming."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.run_states import state
from tests.workers import run_together

from orthrus.cli import train as train_module
from orthrus.cli.app import main

from .conftest import Cli, Run, assert_refused
from .training_files import SYNTH, stopped_after, write_prompts, write_recipe


def test_from_prompts_to_a_view_that_generates(cli: Cli, tmp_path: Path, model_folder: str) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    made = cli(
        "synth", str(tmp_path / "corpus"), "--model", model_folder, "--prompts", prompts, *SYNTH, "--json"
    )
    assert made.code == 0
    report = json.loads(made.out)
    assert report["dialogues"] + report["dropped"] == report["prompts"] == 12
    assert set(report["domains"]) == {"chat", "math"}
    assert report["answer_tokens"] == sum(d["answer_tokens"] for d in report["domains"].values())
    assert "12 of 12 prompts answered" in made.err

    output = tmp_path / "run"
    settings = {"base": model_folder, "corpus": str(tmp_path / "corpus"), "output": str(output)}
    recipe = write_recipe(tmp_path / "recipe.yaml", **settings)
    trained = cli("train", recipe, "steps=4")
    assert trained.code == 0
    assert "step 4, last view in" in trained.out
    assert "tokens per cycle in real decodes" in trained.out
    for words in ("step 2/4: loss", "expected tokens per cycle", "diffusion tokens/s", "on held-out prompts"):
        assert words in trained.err
    names = sorted(p.name for p in output.iterdir())
    assert names == [".orthrus.lock", "best", "run.json", "state", "view"]

    for view in ("best", "view"):
        made_by = json.loads((output / view / "view_config.json").read_text())
        assert made_by["trained"] is True
        assert made_by["block_size"] == 4
        provenance = made_by["provenance"]
        assert provenance["recipe"]["steps"] == 4
        assert provenance["corpus"]["dialogues"] == report["dialogues"]
        assert provenance["corpus"]["sources"] == ["prompts.jsonl"]
        assert "| prompts from | prompts.jsonl |" in (output / view / "README.md").read_text()
        stock = cli(
            "generate", model_folder, "hello", "--view", "untrained", "-n", "24", "--ignore-eos", "-q"
        )
        ours = cli(
            "generate", model_folder, "hello", "--view", str(output / view), "-n", "24", "--ignore-eos", "-q"
        )
        assert ours.code == 0
        assert ours.out == stock.out


def test_the_same_command_goes_on_and_ends_as_an_unbroken_run(
    cli: Cli, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cli("train", recipe, f"output={tmp_path / 'whole'}", "--json")
    assert whole.code == 0

    log = train_module._Run._log

    def interrupted(self: Any, entry: Any) -> None:
        log(self, entry)
        if entry.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train_module._Run, "_log", interrupted)
    first = cli("train", recipe)
    assert first.code == 130
    assert "stopped after step 3; the same command goes on" in first.err
    assert state(tmp_path / "run")["step"] == 3
    assert (tmp_path / "run" / "view" / "view.safetensors").is_file()
    monkeypatch.undo()

    second = cli("train", recipe, "--json")
    assert second.code == 0
    assert "going on after step 3 of 6" in second.err
    reports = [json.loads(run.out) for run in (whole, second)]
    assert reports[0]["loss"] == reports[1]["loss"]
    assert reports[0]["decoded_tokens_per_cycle"] == reports[1]["decoded_tokens_per_cycle"]
    assert reports[0]["best"] == reports[1]["best"]
    for part in ("view", "best"):
        files = [tmp_path / run / part / "view.safetensors" for run in ("whole", "run")]
        assert files[0].read_bytes() == files[1].read_bytes()

    third = cli("train", recipe, "--json")
    assert third.code == 0
    assert json.loads(third.out)["step"] == 6


def test_a_killed_run_resumes_from_its_last_saved_state(cli: Cli, recipe: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orthrus.cli.app", "train", recipe, "steps=100000", "log_every=1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 5/"):
                process.kill()
                break
    # The state of step 4 may not have been written to its end.
    assert state(tmp_path / "run")["step"] >= 2
    assert cli("train", recipe).code == 2
    resumed = stopped_after(cli, recipe, "steps=100000")
    assert resumed.code == 130
    assert "going on after step" in resumed.err


def test_a_run_may_start_from_another_runs_view(cli: Cli, recipe: str, tmp_path: Path) -> None:
    assert cli("train", recipe, "layers=[1]").code == 0
    first = str(tmp_path / "run" / "view")
    then = (f"output={tmp_path / 'then'}", f"init_view={first}", "block_size=6")
    run = cli("train", recipe, *then)
    assert run.code == 0
    config = json.loads((tmp_path / "then" / "view" / "view_config.json").read_text())
    assert config["block_size"] == 6
    assert config["layers"] == [1]
    assert_refused(cli("train", recipe, *then[:1], *then[2:]), "other settings (init_view)")
    other = (f"output={tmp_path / 'other'}", then[1], "layers=[0]")
    assert_refused(cli("train", recipe, *other), "layers [1]", "wants layers [0]")
    assert_refused(cli("train", recipe, *other[:1], "init_view=absent"), "view_config.json")


def test_two_processes_end_as_one_does(cli: Cli, recipe: str, tmp_path: Path) -> None:
    alone = json.loads(cli("train", recipe, "--json").out)
    command = ["train", recipe, f"output={tmp_path / 'two'}", "--json"]
    first, other = _in_two_processes(tmp_path, 2, *command, "sharding=fsdp2")
    assert first.code == 130
    assert "stopped after step 3; the same command goes on" in first.err
    assert other.out == other.err == ""
    second, other = _in_two_processes(tmp_path, 0, *command)
    assert second.code == other.code == 0
    assert "going on after step 3 of 6" in second.err
    assert other.out == other.err == ""
    together = json.loads(second.out)
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert together["decoded_tokens_per_cycle"] == alone["decoded_tokens_per_cycle"]
    views = [state(tmp_path / folder)["view"] for folder in ("run", "two")]
    torch.testing.assert_close(views[1], views[0], atol=1e-4, rtol=1e-3)


def _in_two_processes(folder: Path, stop_at: int, *arguments: str) -> list[Run]:
    """What each of two processes printed; Ctrl-C comes to the main one after step `stop_at` (0: never)."""
    run_together(_command, 2, folder / f"store-{stop_at}", str(folder), stop_at, arguments)
    return [Run(**json.loads((folder / f"printed-{rank}.json").read_text())) for rank in range(2)]


def _command(folder: str, stop_at: int, arguments: tuple[str, ...]) -> None:
    log = train_module._Run._log

    def logged(self: Any, entry: Any) -> None:
        log(self, entry)
        if entry.step == stop_at:
            signal.raise_signal(signal.SIGINT)

    train_module._Run._log = logged  # type: ignore[method-assign]
    out, err, code = io.StringIO(), io.StringIO(), None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    printed = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
    (Path(folder) / f"printed-{os.environ['RANK']}.json").write_text(json.dumps(printed))
