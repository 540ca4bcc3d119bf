"""Nothing of the user's is deleted or replaced: refused by a sentence, before any work."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.run_states import state

from orthrus.base import loading
from orthrus.cli import common
from orthrus.training.state_folder import state_file

from .conftest import Cli, assert_refused
from .training_files import SYNTH, write_prompts

ORTHRUS = [sys.executable, "-m", "orthrus.cli.app"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is work."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_base", fail)


@pytest.mark.parametrize(
    "mine",
    [
        "view/mine.txt",
        "best/mine.txt",
        "view/view_config.json",
        "best",
        "view",
        "run.json",
        "state/mine",
        "state/state.json",
        "state.pt",
    ],
)
def test_train_refuses_a_folder_with_files_of_the_user(
    cli: Cli, recipe: str, tmp_path: Path, no_work: None, mine: str
) -> None:
    file = tmp_path / "run" / mine
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    assert_refused(cli("train", recipe), "move it away")
    assert contents(tmp_path / "run") == {mine: b"precious"}


def test_train_refuses_to_write_into_nothing_named(
    cli: Cli, recipe: str, tmp_path: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "view").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert_refused(cli("train", recipe, "output="), "output has no value")
    assert_refused(cli("train", recipe, "output=''"), "output must name something")
    assert_refused(cli("train", recipe, "output=."), "view was not written by this run")
    (tmp_path / "file").touch()
    assert_refused(cli("train", recipe, f"output={tmp_path / 'file'}"), "is not a folder")
    assert_refused(cli("train", recipe, f"output={tmp_path / 'file' / 'x'}"), "is not a folder")
    assert not any((tmp_path / "here" / "view").iterdir())


def test_a_run_goes_on_only_over_what_it_left(cli: Cli, recipe: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert cli("train", recipe, "steps=2", "evaluate_every=2").code == 0
    for name in (".best.mine", ".view.old.x/view", ".state.mine"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("precious")
    assert cli("train", recipe, "steps=2", "evaluate_every=2").code == 0
    assert sum(content == b"precious" for content in contents(folder).values()) == 3
    (folder / "view" / "notes.txt").write_text("precious")
    before = contents(folder)
    assert_refused(cli("train", recipe, "steps=2"), "view holds notes.txt, which this run did not write")
    (folder / "view" / "notes.txt").unlink()
    (folder / "best" / "README.md").write_text("my own words")
    before = contents(folder)
    assert_refused(cli("train", recipe, "steps=2"), "README.md, which was changed")
    assert contents(folder) == before


def test_two_runs_in_one_folder(cli: Cli, recipe: str, tmp_path: Path) -> None:
    """The second is refused; the first one saves when it is asked to leave."""
    command = [
        *ORTHRUS,
        "train",
        recipe,
        "steps=100000",
        "log_every=1",
        "save_every=90000",
        "evaluate_prompts=0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 2/"):
                break
        try:
            assert_refused(cli("train", recipe, *command[5:]), f"process {process.pid} on ", "trains in")
        finally:
            process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from there" in said
    assert state(tmp_path / "run")["step"] >= 2
    assert (tmp_path / "run" / "view" / "view.safetensors").is_file()
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names <= {".orthrus.lock", "run.json", "state", "view", "tensorboard"}


def test_a_disk_without_room_is_found_before_the_first_step(
    cli: Cli, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    run = cli("train", recipe)
    assert_refused(run, "are needed")
    assert "step" not in run.err
    assert not state_file(tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["manifest.json", "prompts.jsonl", "source-00.jsonl", "answers-00000.jsonl"])
def test_synth_refuses_a_folder_with_files_of_the_user(
    cli: Cli, tmp_path: Path, model_folder: str, no_work: None, name: str
) -> None:
    target = tmp_path / "corpus"
    target.mkdir()
    prompts = write_prompts(target / name)
    before = contents(target)
    command = ("synth", str(target), "--model", model_folder, *SYNTH)
    assert_refused(cli(*command, "--prompts", prompts), "a new folder")
    assert contents(target) == before
    (tmp_path / "file").touch()
    assert_refused(
        cli("synth", str(tmp_path / "file"), *command[2:], "--prompts", prompts), "is not a folder"
    )


def test_synth_that_found_no_prompt_removes_only_its_own(cli: Cli, tmp_path: Path, model_folder: str) -> None:
    target = tmp_path / "corpus"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "..."}\n')
    command = ("synth", str(target), "--model", model_folder, "--prompts", str(tmp_path / "prompts.jsonl"))
    assert_refused(cli(*command, *SYNTH), "no prompt is left")
    (target / "source-33.jsonl").write_text("precious")
    assert_refused(cli(*command, *SYNTH), "no prompt is left")
    assert (target / "source-33.jsonl").read_text() == "precious"
    assert not (target / "source-00.jsonl").exists()


@pytest.mark.parametrize("command", ["bench", "audit"])
def test_reports_do_not_replace_other_files(cli: Cli, tmp_path: Path, no_work: None, command: str) -> None:
    file = tmp_path / "notes.json"
    file.write_text('{"mine": true}')
    assert_refused(cli(command, "--output", str(file)), "is no report of Orthrus")
    assert file.read_text() == '{"mine": true}'
    assert_refused(cli(command, "--output", str(file / "x")), "is not a folder")


def test_convert_finds_out_first_that_it_cannot_write(cli: Cli, tmp_path: Path, no_work: None) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert_refused(cli("convert", "default", str(tmp_path / "file" / "out")), "is not a folder")
    assert_refused(cli("convert", "default", str(tmp_path / "link")), "exists already")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_synth_that_is_asked_to_leave_keeps_every_whole_shard(
    cli: Cli, tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The signal comes while the second shard is being written: it is not lost."""
    prompts, target = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "corpus"
    command = ("synth", str(target), "--model", model_folder, "--prompts", prompts, *SYNTH)
    write_text = Path.write_text

    def asked(self: Path, text: str, **options: str) -> int:
        if self.name.startswith(".answers-00001"):
            signal.raise_signal(number)
        return write_text(self, text, **options)

    monkeypatch.setattr(Path, "write_text", asked)
    stopped = cli(*command)
    monkeypatch.undo()
    assert stopped.code == 128 + number
    assert "whole shards are kept" in stopped.err
    assert sorted(p.name for p in target.glob("*answers*")) == ["answers-00000.jsonl", "answers-00001.jsonl"]
    assert not [p.name for p in target.iterdir() if "scratch" in p.name]
    assert cli(*command).code == 0
    assert len(list(target.glob("answers-*"))) == 3


def test_signals_that_we_were_started_to_ignore_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with common.handling(common.KILLS, lambda number, frame: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("key", ["base", "corpus", "init_view", "output", "layers", "twins", "mask", "rank"])
def test_recipes_with_wrong_values_are_one_sentence(cli: Cli, recipe: str, tmp_path: Path, key: str) -> None:
    for value in ([[1]], {"a": 1}, -(10**30), 10**30, "a\0b", "\ud800", [10**30]):
        assert_refused(cli("train", recipe, f"{key}={json.dumps(value)}"))
    settings = yaml.safe_load(Path(recipe).read_text())
    assert settings["output"] == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_home_folder_that_is_not_there_is_named(cli: Cli, tmp_path: Path, model_folder: str) -> None:
    folder = tmp_path / "corpus"
    refused = cli("synth", str(folder), "--model", model_folder, "--prompts", "~nobody-here/prompts.jsonl")
    assert_refused(refused, "no home folder for '~nobody-here/prompts.jsonl'")
    assert not folder.exists()
