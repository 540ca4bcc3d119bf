"""Streamed text breaks between words on a terminal, and stays as it is in a pipe."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthrus.cli.render import DraftMarker, counted, print_stream
from orthrus.cli.wrap import WordWrap
from orthrus.types import Cycle

from .conftest import Terminal, byte_tokenizer

UNDERLINE, RESET = "\x1b[4m", "\x1b[0m"


def wrapped(pieces: list[str], width: int) -> str:
    wrap = WordWrap(lambda: width)
    return "".join(wrap.feed(piece) for piece in pieces) + wrap.end()


def test_a_word_goes_to_the_next_line_as_a_whole() -> None:
    assert wrapped(["The sky is bl", "ue today"], 12) == "The sky is\nblue today"


def test_a_word_that_just_fits_stays() -> None:
    assert wrapped(["The sky is blue"], 15) == "The sky is blue"
    assert wrapped(["The sky is blue", "r"], 15) == "The sky is\nbluer"


def test_line_ends_and_indentation_stay() -> None:
    code = "def f(n):\n    if n < 2:\n        return n\n"
    assert wrapped([code], 80) == code


def test_a_word_longer_than_a_line_is_left_to_the_terminal() -> None:
    # The terminal breaks the word itself; the next word goes where it stopped.
    assert wrapped(["see https://example.org/long", " ok"], 10) == "see https://example.org/long\nok"
    assert wrapped(["see https://example.org/long", " ok"], 12) == "see https://example.org/long ok"


def test_wide_characters_break_anywhere() -> None:
    assert wrapped(["天空是", "蓝色的"], 8) == "天空是蓝\n色的"


def test_marks_take_no_room() -> None:
    shown = wrapped([f"The {UNDERLINE}sky{RESET} is", f"{UNDERLINE} blue{RESET}"], 10)
    assert shown.replace(UNDERLINE, "").replace(RESET, "") == "The sky is\nblue"
    assert shown.count(UNDERLINE) == shown.count(RESET) == 2


def test_a_word_waits_for_its_end_and_no_longer() -> None:
    wrap = WordWrap(lambda: 80)
    assert wrap.feed("The sk") == "The"
    assert wrap.feed("y ") == " sky"
    assert wrap.end() == " "


@given(st.lists(st.text("ab \n天\t", max_size=12), max_size=8), st.integers(4, 20))
def test_only_blanks_are_lost_and_only_at_line_ends(pieces: list[str], width: int) -> None:
    text, shown = "".join(pieces), wrapped(pieces, width)
    assert shown.split() == text.split() or "天" in text
    assert [c for c in shown if not c.isspace()] == [c for c in text if not c.isspace()]
    # How the text comes in pieces changes nothing.
    assert shown == wrapped(list(text), width)
    assert shown.count("\n") >= text.count("\n")


@given(st.text("abc ", max_size=60), st.integers(4, 20))
def test_no_line_is_wider_than_the_terminal(text: str, width: int) -> None:
    words = text.split()
    if all(len(word) <= width for word in words):
        assert all(len(line.rstrip()) <= width for line in wrapped([text.strip()], width).split("\n"))


def cycle(text: str, ids: tuple[int, ...] = ()) -> Cycle:
    return Cycle(0, "ar", text, ids, (True,) * len(ids), 0, 0, 1, 1, 1.0)


def test_streams_wrap_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    cycles = [cycle("The sky is bl"), cycle("ue today")]
    print_stream(cycles)
    assert capsys.readouterr().out == "The sky is blue today\n"
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    print_stream(cycles)
    assert screen.getvalue() == "The sky is\nblue today\n"


def test_marked_streams_wrap_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setenv("NO_COLOR", "1")
    screen, tokenizer = Terminal(), byte_tokenizer()
    monkeypatch.setattr(sys, "stdout", screen)
    texts = ["The sky is bl", "ue today"]
    print_stream([cycle(t, tuple(tokenizer(t)["input_ids"])) for t in texts], DraftMarker(tokenizer))
    plain = screen.getvalue().replace(UNDERLINE, "").replace(RESET, "")
    assert plain == "The sky is\nblue today\n"


def test_what_was_shown_of_a_broken_stream_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken():
        yield cycle("The sky is bl")
        raise KeyboardInterrupt

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with pytest.raises(KeyboardInterrupt):
        print_stream(broken())
    assert screen.getvalue() == "The sky is bl"


def test_one_of_a_kind_is_one() -> None:
    assert [counted(n, "turn") for n in (0, 1, 2)] == ["0 turns", "1 turn", "2 turns"]
    assert [counted(n, "pass") for n in (1, 2)] == ["1 pass", "2 passes"]
