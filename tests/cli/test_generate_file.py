"""`orthrus generate --prompts`: an answer a line, in order, and how it goes on after it was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orthrus.api import Orthrus
from orthrus.base.owned import locked_file
from orthrus.cli import generate_file as module

from .conftest import Cli, assert_refused

TEXTS = ["hello", "what now", "and then", "once more", "the end"]
OPTIONS = ("--view", "untrained", "--strategy", "chain", "-n", "12", "--runner", "eager", "--ignore-eos")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    records: list[dict[str, Any]] = [{"prompt": text} for text in TEXTS[:4]]
    records.append({"messages": [{"role": "user", "content": TEXTS[4]}]})
    file.write_text("".join(json.dumps(record) + "\n\n" for record in records))
    return file


def ask(cli: Cli, model: str, prompts: Path, output: Path, *options: str) -> Any:
    return cli("generate", model, "--prompts", str(prompts), "-o", str(output), *OPTIONS, *options)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("concurrency", ["1", "3"])
@pytest.mark.parametrize("sampling", [(), ("-t", "1", "--seed", "7")], ids=["greedy", "sampled"])
def test_each_line_is_the_answer_to_its_prompt(
    cli: Cli, model_folder: str, prompts: Path, tmp_path: Path, concurrency: str, sampling: tuple[str, ...]
) -> None:
    output = tmp_path / "new" / "out.jsonl"
    run = ask(cli, model_folder, prompts, output, "--concurrency", concurrency, *sampling)
    assert (run.code, run.out) == (0, "")
    assert "5 answers, 60 tokens" in run.err
    orthrus = Orthrus.load(model_folder, view="untrained", runner="eager")
    decode: dict[str, Any] = {"strategy": "ar", "max_new_tokens": 12, "ignore_eos": True}
    found = lines(output)
    assert len(found) == 5
    for index, (line, text) in enumerate(zip(found, TEXTS, strict=True)):
        own = {"temperature": 1.0, "seed": 7 + index} if sampling else {}
        result = orthrus.generate(text, **(decode | own))
        assert line["token_ids"] == list(result.token_ids)
        assert line["text"] == result.text
        assert (line["finish_reason"], line["seed"]) == ("length", own.get("seed"))
    assert found[0]["prompt"] == "hello"
    assert found[4]["prompt"] == [{"role": "user", "content": "the end"}]


def test_of_several_turns_the_first_is_asked_and_it_says_so(
    cli: Cli, model_folder: str, tmp_path: Path
) -> None:
    prompts, output = tmp_path / "turns.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"turns": ["abc", "def"]}\n{"prompt": "abc"}\n')
    run = ask(cli, model_folder, prompts, output)
    assert run.code == 0
    assert f"1 line of {prompts} has several turns: only the first turn counts" in run.err
    first, second = lines(output)
    assert first["token_ids"] == second["token_ids"]


@pytest.mark.parametrize("torn", [0, 1, 30, 60])
def test_what_is_there_is_kept_and_not_asked_again(
    cli: Cli,
    model_folder: str,
    prompts: Path,
    tmp_path: Path,
    torn: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out.jsonl"
    ask(cli, model_folder, prompts, output)
    whole = output.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    output.write_bytes(whole[: ends[1] + torn])
    asked: list[int] = []
    answers = module._answers

    def watched(orthrus: Any, ids: Any, decode: Any, first: int, concurrency: int) -> Any:
        asked.append(first)
        return answers(orthrus, ids, decode, first, concurrency)

    monkeypatch.setattr(module, "_answers", watched)
    # Another strategy and more at a time: the same text.
    run = ask(cli, model_folder, prompts, output, "--strategy", "ar", "--concurrency", "2")
    assert run.code == 0
    assert "3 answers" in run.err
    assert "2 were there" in run.err
    assert asked == [2]
    assert output.read_bytes() == whole
    before = output.stat().st_mtime_ns
    assert "all 5 answers already" in ask(cli, model_folder, prompts, output).err
    assert output.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("my notes\n", "line 1: no answer"),
        ("my notes", "no answer of ours"),
        ('{"key": "0000000000000000", "prompt": "x"}\n', "line 1: no answer"),
        ('{"key": "0000000000000000", "prompt": "x"}', "no answer of ours"),
        ("\n", "line 1: no answer"),
    ],
)
def test_a_file_of_somebody_elses_is_left_alone(
    cli: Cli, prompts: Path, tmp_path: Path, content: str, said: str
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text(content)
    assert_refused(ask(cli, "no-such-model", prompts, output), said, "name a new file")
    assert output.read_text() == content


@pytest.mark.parametrize("change", ["-n", "-t", "prompts", "fewer"])
def test_other_prompts_or_settings_are_refused(
    cli: Cli, model_folder: str, prompts: Path, tmp_path: Path, change: str
) -> None:
    output = tmp_path / "out.jsonl"
    ask(cli, model_folder, prompts, output)
    before, options = output.read_bytes(), {"-n": ("-n", "13"), "-t": ("-t", "1")}.get(change, ())
    if change == "prompts":
        prompts.write_text(prompts.read_text().replace("what now", "what else"))
    if change == "fewer":
        prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:4]))
    line = {"prompts": "line 2", "fewer": "line 3"}.get(change, "line 1")
    assert_refused(ask(cli, model_folder, prompts, output, *options), f"{line}: no answer", "new file")
    assert output.read_bytes() == before


def test_two_at_once_are_refused(cli: Cli, model_folder: str, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with locked_file(output, "writes"):
        assert_refused(ask(cli, model_folder, prompts, output), f"process {os.getpid()}", "output file")
    assert not output.exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--prompts", "{prompts}"), "--output OUT.jsonl"),
        (("-o", "out.jsonl", "hello"), "give --prompts too"),
        (("m", "hello", "--prompts", "{prompts}", "-o", "{out}"), "give no other"),
        (("--prompts", "{prompts}", "-o", "{out}", "--json"), "--json and --color"),
        (("--prompts", "{prompts}", "-o", "{out}", "--raw"), "line 9: messages need the chat template"),
        (("--prompts", "{prompts}", "-o", "{folder}"), "no file"),
        (("--prompts", "missing.jsonl", "-o", "{out}"), "cannot read the prompts"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    cli: Cli, prompts: Path, tmp_path: Path, args: tuple[str, ...], said: str
) -> None:
    names = {"prompts": prompts, "out": tmp_path / "out.jsonl", "folder": tmp_path}
    assert_refused(cli("generate", *(arg.format(**names) for arg in args)), said)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_prompt_that_is_too_long_is_told_before_the_first_is_answered(
    cli: Cli, model_folder: str, tmp_path: Path
) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("short", "x" * 300)))
    assert_refused(ask(cli, model_folder, prompts, output), "prompt 2", "context holds 256")
    assert not output.exists()


def test_killed_at_any_moment_it_goes_on(model_folder: str, tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(40)))
    command = [sys.executable, "-m", "orthrus.cli.app", "generate", model_folder, *OPTIONS, "-n", "48"]
    command += ["--prompts", str(prompts), "-o", str(output), "--concurrency", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (output.exists() and output.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = output.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "were there" in done.stderr
    assert output.read_bytes().startswith(kept)
    assert [line["prompt"] for line in lines(output)] == [f"prompt {i}" for i in range(40)]
