"""What people type and pipe: models by name, bytes that are no text, marks, dashes, control codes."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orthrus.base.text import printable
from orthrus.cli import options
from orthrus.cli.common import read_stdin
from orthrus.cli.render import DraftMarker, print_json, print_stream
from orthrus.errors import UserInputError
from orthrus.types import Cycle

from .conftest import Cli, assert_refused, byte_tokenizer, write_model

QUICK = ("-q", "-n", "2", "--strategy", "ar", "--runner", "eager")


def test_a_model_by_name_is_the_model_of_the_argument(cli: Cli, model_folder: str) -> None:
    by_place = cli("generate", model_folder, "hello", *QUICK)
    for name in ("-m", "--model"):
        assert cli("generate", name, model_folder, "hello", *QUICK).out == by_place.out
    assert by_place.code == 0
    assert cli("chat", "-m", model_folder, *QUICK, stdin="hello\n").code == 0


@pytest.mark.parametrize("command", ["chat", "bench", "audit"])
def test_two_models_are_refused(cli: Cli, command: str) -> None:
    assert_refused(cli(command, "a/b", "-m", "c/d"), "two models are given", "'a/b'", "'c/d'")


def test_two_models_are_refused_beside_a_prompt(cli: Cli) -> None:
    assert_refused(cli("generate", "a/b", "hello", "-m", "c/d"), "2 arguments were given", "a PROMPT is")


def test_convert_takes_the_source_by_name(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    assert cli("convert", "-m", model_folder, str(tmp_path / "view"), "-q").code == 0
    assert (tmp_path / "view" / "view_config.json").is_file()
    assert_refused(cli("convert", model_folder), "orthrus convert SOURCE OUT")
    assert_refused(cli("convert", "a/b", str(tmp_path / "x"), "-m", "c/d"), "two models")


def test_what_is_wrong_with_a_view_is_told_before_a_base_is_loaded(
    cli: Cli, model_folder: str, tmp_path: Path
) -> None:
    base, empty, file = tmp_path / "base", tmp_path / "empty", tmp_path / "README.md"
    base.mkdir()
    empty.mkdir()
    file.write_text("x")
    # Without weights: whoever loaded it would say so.
    shutil.copy(Path(model_folder) / "config.json", base)
    assert_refused(cli("generate", "-m", str(base), "hi"), "holds a config but no weights")
    for view, told in ((file, "is a file; name the folder of a view"), (empty, "view_config.json")):
        assert_refused(cli("generate", "-m", str(base), "hi", "--view", str(view)), told)


def test_train_takes_the_base_by_name(cli: Cli, recipe: str) -> None:
    assert_refused(cli("train", recipe, "-m", "/no/such/base"), "/no/such/base")


def test_every_command_with_a_model_takes_it_by_name(cli: Cli) -> None:
    for command in ("generate", "chat", "demo", "bench", "audit", "synth", "train", "convert"):
        shown = cli(command, "--help").out
        assert "--model" in shown, command
        assert "-m" in shown, command


class Bytes:
    """stdin of a process: bytes, whatever the locale makes of them."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"hi", "hi"), (b"\xef\xbb\xbfhi\r\nyou\r\n", "hi\nyou\n"), ("café".encode(), "café"), (b"", "")],
)
def test_stdin_is_utf_8_without_a_mark(monkeypatch: pytest.MonkeyPatch, content: bytes, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", Bytes(content))
    assert read_stdin() == text


def test_stdin_that_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Bytes(b"caf\xe9\n"))
    with pytest.raises(UserInputError, match="stdin is not valid text"):
        read_stdin()


def test_words_that_are_no_text_are_refused(cli: Cli, model_folder: str) -> None:
    assert_refused(cli("generate", model_folder, "caf\udce9"), "The prompt is not valid text")
    assert_refused(
        cli("generate", model_folder, "hi", "--system", "caf\udce9"), "The system prompt is not valid text"
    )
    run = cli("chat", model_folder, *QUICK, stdin="caf\udce9\n")
    assert run.code == 2
    assert "not valid text" in run.err


@pytest.mark.slow
def test_bytes_that_are_no_text_in_a_container(model_folder: str) -> None:
    command = [sys.executable, "-m", "orthrus.cli.app", "generate", "-m", model_folder, *QUICK]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    for more, stdin in (([], b"caf\xe9\n"), ([b"caf\xe9"], b"")):
        done = subprocess.run([*command, *more], input=stdin, capture_output=True, env=environment)
        assert done.returncode == 2, done.stderr
        assert b"is not valid text" in done.stderr


def test_a_mark_before_the_first_turn_is_dropped(cli: Cli, model_folder: str) -> None:
    with_mark, without = (cli("chat", model_folder, *QUICK, stdin=f"{mark}hi\n") for mark in ("\ufeff", ""))
    assert with_mark.out == without.out
    assert with_mark.code == 0


def test_a_prompt_that_begins_with_a_dash_is_told_how(cli: Cli, model_folder: str) -> None:
    assert_refused(cli("generate", "-5 + 3 = ?"), "No such option", 'orthrus generate -- "-5 + 3 = ?"')
    assert cli("generate", *QUICK, "-m", model_folder, "--", "-5 + 3 = ?").code == 0


def test_a_line_end_in_a_stop_text() -> None:
    assert options.stop_texts(["\\n", "a\\n\\nb", "\n", "x"]) == ("\n", "a\n\nb", "\n", "x")
    assert options.stop_texts(None) == ()


ESCAPES = "a\x1b[31mred\x07\x9b2J\x7f\tb\n"


def cycle(text: str, token_ids: tuple[int, ...] = ()) -> Cycle:
    drafts = (True,) * len(token_ids)
    return Cycle(0, "ar", text, token_ids, drafts, 0, 0, 1, 1, 1.0, "stop")


def test_control_codes_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    shown = "a\\x1b[31mred\\x07\\x9b2J\\x7f\tb\n"
    assert printable(ESCAPES) == shown
    print_stream([cycle(ESCAPES)])
    assert capsys.readouterr().out == shown
    print_json({"text": ESCAPES})
    out = capsys.readouterr().out
    assert printable(out) == out
    assert json.loads(out) == {"text": ESCAPES}


def test_control_codes_of_drafts_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    ids = tuple(tokenizer("\x1b[2Jx")["input_ids"])
    print_stream([cycle("\x1b[2Jx", ids)], DraftMarker(tokenizer))
    out = capsys.readouterr().out
    assert "\\x1b[2Jx" in out
    assert "\x1b[2J" not in out


def test_control_codes_of_a_folder_do_not_reach_the_terminal(cli: Cli, tmp_path: Path) -> None:
    folder = str(write_model(tmp_path / "evil\x1b[2Jname"))
    for run in (
        cli("generate", folder, "hi", "-n", "2", "--strategy", "ar", "--runner", "eager"),
        cli(
            "bench", folder, "-n", "2", "--limit", "1", "--repeats", "1", "--warmup", "0", "--strategy", "ar"
        ),
        cli("chat", folder, "-n", "2", "--strategy", "ar", "--runner", "eager", stdin="hi\n/set \x1b[2J\n"),
        cli("generate", folder + "\x1b[3J/no", "hi"),
    ):
        assert "\x1b" not in run.out + run.err
