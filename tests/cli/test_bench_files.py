"""`orthrus bench` and its files: suites, a run that is killed, vLLM's form, the page and its pictures."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orthrus.base.owned import locked_file
from orthrus.cli import bench_report
from orthrus.errors import UserInputError

from .conftest import Cli, assert_refused

SHORT = ("--view", "untrained", "--max-new-tokens", "6", "--warmup", "0")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": str(n), "domain": "ab"[n % 2]}) + "\n" for n in range(20)))
    return str(file)


def test_a_killed_run_goes_on_where_it_stopped(
    cli: Cli, model_folder: str, prompts: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    command = ["bench", model_folder, *SHORT, "--prompts", prompts, "--repeats", "2", "--strategy", "chain"]
    command += ["-o", str(file)]
    running = subprocess.Popen(
        [sys.executable, "-m", "orthrus.cli.app", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        while not file.exists() and running.poll() is None:
            time.sleep(0.01)
    finally:
        running.kill()
        running.communicate()
    begun = json.loads(file.read_text())
    assert begun["is_complete"] is False
    kept = len(begun["runs"])
    assert 0 < kept < 3 * 2 * 20
    refused = cli(*command, "--seed", "7")
    assert_refused(refused, "unfinished", "seed", "name a new file")
    done = cli(*command)
    assert done.code == 0
    assert f"holds {kept} runs" in done.err
    report = json.loads(file.read_text())
    assert report["is_complete"] is True
    assert report["runs"][:kept] == [run | {"equal_to_plain": True} for run in begun["runs"]]
    assert len(report["runs"]) == 3 * 2 * 20
    assert len(report["provenance"]["resumed"]) == 1


def test_the_quick_suite_needs_no_files(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    short = ("--limit", "1", "--domain", "chat", "--strategy", "chain:block-size=4")
    run = cli("bench", model_folder, "--suite", "quick", *short, *SHORT, "--format", "vllm")
    assert run.code == 0
    found = json.loads(run.out)
    assert {entry["temperature"] for entry in found} == {0.0, 1.0}
    assert {entry["arm"] for entry in found} == {"chain:block-size=4"}
    assert all("per_step_accepted" in entry["metrics"]["speculative_decoding"] for entry in found)


def test_settings_of_an_arm_are_checked(cli: Cli, model_folder: str) -> None:
    assert_refused(cli("bench", model_folder, "--strategy", "chain:colour=blue"), "colour=blue", "floor")
    assert_refused(cli("bench", model_folder, "--strategy", "chain:block-size=1"), "block_size")


def test_the_page_and_its_pictures(
    cli: Cli, model_folder: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, page, plots = tmp_path / "run.json", tmp_path / "page.html", tmp_path / "plots"
    arms = ("--strategy", "chain", "--strategy", "auto", "--limit", "1", "--repeats", "1")
    assert cli("bench", model_folder, *SHORT, "--prompts", prompts, *arms, "-o", str(file)).code == 0
    monkeypatch.setattr(bench_report, "BROWSERS", ("no-such-browser",))
    run = cli("bench", "report", str(file), "-o", str(page), "--plots", str(plots))
    assert (run.code, run.out) == (0, "")
    assert "no Chromium" in run.err
    assert page.read_text().startswith("<!doctype html>")
    assert (plots / "waterfall-greedy.svg").read_text().startswith("<svg")
    assert cli("bench", "report", str(file), "-o", str(page)).code == 0
    other = tmp_path / "mine.html"
    other.write_text("<p>mine</p>")
    assert_refused(cli("bench", "report", str(file), "-o", str(other)), "mine.html", "no page of Orthrus")
    assert_refused(cli("bench", "report", prompts, "-o", str(page)), "prompts.jsonl")


def test_a_file_that_another_run_writes_is_refused(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    for command in ("bench", "audit"):
        with locked_file(output, "writes"):
            assert_refused(cli(command, model_folder, "-o", str(output)), f"writes {output}")
    assert not output.exists()


def test_a_link_has_the_lock_of_its_file(tmp_path: Path) -> None:
    output, link = tmp_path / "out.json", tmp_path / "latest.json"
    link.symlink_to(output)
    with (
        locked_file(link, "writes"),
        pytest.raises(UserInputError, match=r"writes .*out\.json"),
        locked_file(output, "writes"),
    ):
        pass
