"""Progress: a bar on a terminal, one line per stage elsewhere, nothing when quiet."""

import sys

import pytest

from orthrus.cli import progress
from orthrus.cli.progress import ProgressDisplay

from .conftest import Terminal


def _report(display: ProgressDisplay) -> None:
    with display as on_progress:
        on_progress.spin("starting")
        on_progress("downloading [x]", 10, 100)
        on_progress("downloading [x]", 100, 100)
        on_progress("loading", 0, None)


def test_one_line_per_stage_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    _report(ProgressDisplay())
    captured = capsys.readouterr()
    assert captured.err == "downloading [x]\nloading\n"
    assert captured.out == ""


def test_a_long_stage_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ProgressDisplay(unit="answers") as on_progress:
        for done in range(3):
            on_progress("baseline", done, 300)
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        on_progress("baseline", 3, 300)
        on_progress("baseline", 3, None)
    assert capsys.readouterr().err == "baseline\nbaseline: 3 of 300 answers\n"
    _report(ProgressDisplay())
    assert capsys.readouterr().err == "downloading [x]\ndownloading [x]: 100%\nloading\n"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _report(ProgressDisplay(quiet=True))
    assert capsys.readouterr().err == ""


def _shown(monkeypatch: pytest.MonkeyPatch, unit: str, *reports: tuple[str, int, int | None]) -> str:
    """All that a wide terminal gets to see of these reports."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressDisplay(unit=unit) as on_progress:
        for report in reports:
            on_progress(*report)
            on_progress._bar.refresh()
    return screen.getvalue()


def test_a_bar_names_what_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _shown(monkeypatch, "prompts", ("answering", 2, 5))
    assert "2/5 prompts" in shown
    assert "bytes" not in shown


def test_bytes_are_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "10.0/98.0 MB" in _shown(monkeypatch, "bytes", ("downloading", 10_000_000, 98_000_000))


def test_what_is_not_counted_shows_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling, which showed "0/3 bytes" once."""
    shown = _shown(monkeypatch, "bytes", ("compiling for this processor", 0, None))
    assert "compiling for this processor" in shown
    assert "bytes" not in shown
    assert "0/" not in shown


@pytest.mark.parametrize("unit", ["bytes", "rounds"])
def test_bar_on_a_terminal_vanishes_at_the_end(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    _report(ProgressDisplay(unit=unit))
    shown = screen.getvalue()
    assert "loading" in shown
    assert "?" not in shown.replace("\x1b[?", "")
    assert "\x1b[2K" in shown[-20:]
