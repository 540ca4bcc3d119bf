"""Provenance: JSON-ready, complete, and honest about where the code came from."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from orthrus.base.provenance import command_line, cpu_model, git_state, provenance


def test_it_is_complete_and_json_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/orthrus", "bench", "--limit", "2", "a b"])

    found = json.loads(json.dumps(provenance(device="cpu", dtype="torch.float32", seed=3)))

    assert found["command"] == "orthrus bench --limit 2 'a b'"
    assert found["device"] == "cpu"
    assert found["dtype"] == "float32"
    assert found["seed"] == 3
    assert found["threads"] >= 1
    assert found["accelerator"] is None
    assert found["versions"]["torch"]
    assert found["time"].endswith("+00:00")
    assert cpu_model()


def test_a_command_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    inside, outside = str(tmp_path / "runs" / "a.json"), "/home/someone/data/gsm8k.jsonl"
    argv = ["bench", inside, outside, f"--output={outside}", "--limit=2", "data/b.jsonl", "/"]
    monkeypatch.setattr(sys, "argv", argv)

    assert command_line() == "bench runs/a.json gsm8k.jsonl --output=gsm8k.jsonl --limit=2 data/b.jsonl /"

    keys = [f"init_view={outside}", f"corpus=[{inside}, {outside},/x/y]", "url=http://host/v1", "n=1/2"]
    monkeypatch.setattr(sys, "argv", ["train", *keys])

    shown = "train init_view=gsm8k.jsonl 'corpus=[runs/a.json, gsm8k.jsonl,y]' url=http://host/v1 n=1/2"
    assert command_line() == shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("math=/no_think", "math=/no_think"),
        ("math= /no_think", "math= /no_think"),
        ("/no_think", "/no_think"),
        ("What does ls /usr/bin/env do?", "What does ls /usr/bin/env do?"),
        ("Sum up /home/me/diary.txt please", "Sum up diary.txt please"),
        ('corpus=["/home/me/a", "/data/b"]', 'corpus=["a", "b"]'),
        ('name="/home/me/a"', 'name="a"'),
        ("-o/home/me/out.json", "-oout.json"),
        ("/home/me/my file.jsonl", "my file.jsonl"),
        ("--output=/home/me/my file.jsonl", "--output=my file.jsonl"),
        ("json:/data/x.jsonl:math", "json:x.jsonl:math"),
        ("vllm=http://127.0.0.1:8000#/home/me/model", "vllm=http://127.0.0.1:8000#model"),
        ("https://host/v1,http://other:1/v1", "https://host/v1,http://other:1/v1"),
    ],
)
def test_what_is_no_path_of_this_machine_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, shown: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["synth", given])
    assert shlex.split(command_line()) == ["synth", shown]


def test_only_a_checkout_of_this_package_counts(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    package = tmp_path / "src" / "orthrus"
    package.mkdir(parents=True)
    (package / "a.py").write_text("")
    assert git_state(package) == (None, None)

    subprocess.run([*git, "init", "-q"], check=True)
    assert git_state(package) == (None, True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    commit, dirty = git_state(package)
    assert commit is not None
    assert len(commit) == 40
    assert dirty is False

    (package / "a.py").write_text("changed")
    assert git_state(package) == (commit, True)
    installed = tmp_path / ".venv" / "orthrus"
    installed.mkdir(parents=True)
    assert git_state(installed) == (None, None)
