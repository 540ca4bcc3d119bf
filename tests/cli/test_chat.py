"""`orthrus chat` through a pipe and through a stand-in for the line editor."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from orthrus.api import Orthrus
from orthrus.base.text import printable
from orthrus.cli import chat as chat_module

from .conftest import Cli, assert_refused

OPTIONS = ("--view", "untrained", "-n", "12")


def answers(folder: str, *turns: str) -> str:
    conversation = Orthrus.load(folder, view="untrained").chat(max_new_tokens=12)
    return "".join(printable(conversation.send(turn).text) + "\n" for turn in turns)


def test_each_line_is_a_turn_that_remembers(cli: Cli, model_folder: str) -> None:
    run = cli("chat", model_folder, *OPTIONS, stdin="hello.\n\nagain\n")
    assert run.code == 0
    assert run.out == answers(model_folder, "hello.", "again")
    assert run.err.count("acceptance rate") == 2
    for words in ("model", "untrained", "float32 on cpu", "K = 8"):
        assert words in run.err


def test_clear_forgets(cli: Cli, model_folder: str) -> None:
    run = cli("chat", model_folder, *OPTIONS, stdin="hello.\n/clear\nhello.\n")
    assert run.out == answers(model_folder, "hello.") * 2


def test_save_set_stats_and_bye(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    lines = ["/set max-new-tokens 3", "hello.", "/stats", f"/save {file}", "/bye", "never asked"]
    run = cli("chat", model_folder, "--view", "untrained", stdin="\n".join(lines))
    assert run.code == 0
    assert "max_new_tokens 3" in run.err
    assert "1 turn, 3 tokens in " in run.err
    saved = json.loads(file.read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]
    assert saved["decode"]["max_new_tokens"] == 3
    assert_refused(cli("chat", model_folder, *OPTIONS, stdin=f"/save {file}\n"), "exists already")


def test_a_logit_bias_is_set_shown_and_taken_back(cli: Cli, model_folder: str) -> None:
    lines = ["/set logit_bias 5=-100 7=1.5", "/set logit-bias none", "/set repetition_penalty 1.1"]
    run = cli("chat", model_folder, *OPTIONS, stdin="\n".join(lines))
    for words in ("logit_bias 5=-100 7=1.5\n", "logit_bias none\n", "repetition_penalty 1.1\n"):
        assert words in run.err


def test_help_and_settings_list_everything(cli: Cli, model_folder: str) -> None:
    run = cli("chat", model_folder, *OPTIONS, stdin="/help\n/set\n")
    for words in (
        "/help",
        "/clear",
        "/set NAME VALUE",
        "/stats",
        "/save FILE",
        "/bye",
        "temperature 0.0",
        "color off",
    ):
        assert words in run.err
    assert run.out == ""


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("/cleer", "did you mean /clear?"),
        ("/xyz", "/help"),
        ("/set temperatue 1", "did you mean temperature?"),
        ("/set temperature warm", "must be a number"),
        ("/set temperature -1", "temperature"),
        ("/set block_size 1.5", "whole number"),
        ("/set color maybe", "on or off"),
        ("/set strategy beam", "ar, chain"),
        ("/set node_budget none", "must be a whole number"),
        ("/set block_budget 0", "block_budget must be at least 1"),
        ("/set repetition_penalty none", "must be a number"),
        ("/set logit_bias 42", "as in 42=-100, not '42'"),
        ("/save", "name a file"),
        ("/save ~nobody-here/chat.json", "no home folder"),
        (f"/save {'x' * 300}", "cannot be written"),
    ],
)
def test_wrong_commands_end_a_script(cli: Cli, model_folder: str, line: str, word: str) -> None:
    assert_refused(cli("chat", model_folder, *OPTIONS, stdin=f"{line}\n"), word)


def test_compare_times_plain_decoding_too(cli: Cli, model_folder: str) -> None:
    run = cli("chat", model_folder, *OPTIONS, "--compare", stdin="hello.\n")
    assert run.out == answers(model_folder, "hello.")
    assert "plain decoding: " in run.err
    assert "the same tokens" in run.err


def test_model_without_template(cli: Cli, other_model_folder: str) -> None:
    assert_refused(cli("chat", other_model_folder, *OPTIONS, stdin="hello\n"), "no chat template")


class Typist:
    """Types the given lines; an exception among them is raised in its place. Ctrl-D at the end."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines: Iterator[str | type[BaseException]] = iter(lines)

    def __call__(self, prompt: str) -> str:
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


def test_terminal_goes_on_after_errors(cli: Cli, model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    typist = Typist("/cleer", KeyboardInterrupt, "x" * 400, '"""one', 'two"""', "")
    monkeypatch.setattr(chat_module, "_editor", lambda: typist)
    run = cli("chat", model_folder, *OPTIONS, tty=True)
    assert run.code == 0
    assert run.out == answers(model_folder, "one\ntwo")
    assert "did you mean /clear?" in run.err
    assert "context holds 256" in run.err


def test_editor_keeps_a_private_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("hello\r")
        assert chat_module._editor()(">>> ") == "hello"
    history = tmp_path / "chat_history"
    assert "hello" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
