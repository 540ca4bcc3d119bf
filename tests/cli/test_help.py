"""Help, suggestions and the generated page: instant, and without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from orthrus.cli import docs
from orthrus.cli.app import NAMES, app

from .conftest import Cli, assert_refused

HEAVY = ("torch", "transformers", "numpy", "prompt_toolkit")
SCRIPT = """
import sys
sys.argv = ["orthrus", *sys.argv[1:]]
from orthrus.cli.app import main
try:
    main()
except SystemExit as leaving:
    assert (leaving.code or 0) == {code}, leaving.code
loaded = [name for name in {heavy!r} if name in sys.modules]
assert not loaded, loaded
"""


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], *([*name.split(), "--help"] for name in NAMES)], ids=" ".join
)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(heavy=HEAVY, code=0), *args],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    # Processor time, because the machine may be busy with other tests; slow processors take a second.
    after = os.times()
    used_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert used_s < 2.0


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "-n", "0", "hello"],
        ["serve", "--port", "99999"],
        ["bench", "--prompts", "nowhere"],
        ["audit", "--prompts", "nowhere"],
        ["verify", "nowhere.json"],
        ["train", "nowhere.yaml"],
        ["train", "recipes/smoke-cpu.yaml", "loss=kld"],
        ["adapt", "nowhere.jsonl"],
    ],
    ids=" ".join,
)
def test_a_wrong_option_or_file_is_refused_before_torch_is_loaded(args: list[str]) -> None:
    script = SCRIPT.format(heavy=("torch", "transformers"), code=2)
    run = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.startswith("error: ")


@pytest.mark.parametrize("name", NAMES)
def test_help_explains_every_option(cli: Cli, name: str) -> None:
    run = cli(*name.split(), "--help")
    assert run.code == 0
    assert run.err == ""
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    for parameter in command.params:
        assert parameter.help, f"{name} {parameter.name} has no help"


def test_no_arguments_show_the_help(cli: Cli) -> None:
    run = cli()
    assert run.code == 0
    for name in NAMES:
        assert name in run.out


def test_unknown_command_suggests_the_nearest(cli: Cli) -> None:
    assert_refused(cli("genxrate"), "genxrate", "Did you mean 'generate'?")


def test_unknown_option_suggests_the_nearest(cli: Cli) -> None:
    assert_refused(cli("generate", "--max-new-token", "3", "hi"), "Did you mean --max-new-tokens?")


def test_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert docs.main(["--check"]) == 0


def test_page_check_notices_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert docs.main(["--check"]) == 1
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    docs.PAGE.write_text(docs.page() + "more\n")
    assert docs.main(["--check"]) == 1
    assert "python -m orthrus.cli.docs" in capsys.readouterr().err


def test_page_names_every_command_and_option() -> None:
    page = docs.page()
    for name in NAMES:
        assert f"## orthrus {name}\n" in page
    for option in ("--block-size", "--no-floor", "--compare", "--format <table\\|md\\|json\\|csv>"):
        assert option in page
