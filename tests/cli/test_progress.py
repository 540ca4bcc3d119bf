"""Progress: a bar on a terminal, one line per stage elsewhere, nothing when quiet."""

import sys

import pytest

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


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _report(ProgressDisplay(quiet=True))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("count", [False, True])
def test_bar_on_a_terminal_vanishes_at_the_end(monkeypatch: pytest.MonkeyPatch, count: bool) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    _report(ProgressDisplay(count=count))
    shown = screen.getvalue()
    assert "loading" in shown
    assert "?" not in shown.replace("\x1b[?", "")
    assert "\x1b[2K" in shown[-20:]
