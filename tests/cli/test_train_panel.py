"""What a run shows while it trains."""

import io
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from orthrus.cli.synth import SynthDisplay, duration
from orthrus.cli.train_panel import TrainDisplay, log_line, share_of_peak
from orthrus.training.synth import SynthProgress
from orthrus.training.trainer import TrainLog

LOG = TrainLog(
    step=20,
    num_steps=40,
    loss=1.5,
    accuracy_J=(0.75, 0.5),
    expected_tokens=2.125,
    learning_rate=1e-3,
    grad_norm=0.5,
    tokens_per_second=1234.0,
    seconds_left=600.0,
    flops_per_second=1.5e11,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_panel_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with TrainDisplay("a title", peak_flops=3e11) as display:
        display.start(3, 40)
        display.log(LOG)
        display.scoring()
        display.scoring(300, 1600)
        decoding = io.StringIO()
        Console(file=decoding, width=100).print(display._panel())
        display.score(20, 2.5, best=True)
        display.score(30, 2.25, best=False)
        screen = io.StringIO()
        Console(file=screen, width=100).print(display._panel())
    text = screen.getvalue()
    for words in ("a title", "20 of 40", "about 10 min left", "1.5000", "75%", "2.12", "1,234 (50% of"):
        assert words in text
    assert "decoding held-out prompts, 300 tokens of 1,600 at most" in decoding.getvalue()
    assert "2.25 at step 30, best 2.50 at step 20" in text
    assert "Traceback" not in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_a_request_to_stop_is_seen_to_be_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with TrainDisplay("a title") as display:
        display.scoring(1, 1600)
        display.stopping()
        display.scoring(2, 1600)
        display.score(20, 2.5, best=True)
        display.log(LOG)
        screen = io.StringIO()
        Console(file=screen, width=140).print(display._panel())
        assert "stopping after this step" in screen.getvalue()


def test_lines_anywhere_else(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainDisplay("a title") as display:
        display.start(0, 40)
        display.log(LOG)
        display.scoring()
        display.scoring(1, 1600)
        display.score(20, 2.5, best=True)
        display.stopping()
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == log_line(LOG)
    assert lines[0].startswith("decoding held-out prompts")
    assert lines[1] == "step 20: 2.50 tokens per cycle on held-out prompts (best so far)"
    assert lines[2].startswith("stopping after this step")
    with TrainDisplay("a title", quiet=True) as display:
        display.start(5, 40)
        display.log(LOG)
        display.stopping()
    assert capsys.readouterr().err == ""


def test_the_last_line_promises_nothing_more() -> None:
    assert "left" not in log_line(replace(LOG, step=40, seconds_left=0.0))


def test_a_share_above_the_whole_peak_is_left_out() -> None:
    """A step cannot do more than the machine: the peak was measured too low."""
    rate = LOG.flops_per_second
    assert rate is not None
    assert share_of_peak(LOG, 2 * rate) == " (50% of the machine's peak)"
    assert share_of_peak(LOG, rate) == " (100% of the machine's peak)"
    assert share_of_peak(LOG, rate / 10.73) == ""
    assert "peak" not in log_line(LOG, rate / 10.73)


@pytest.mark.parametrize(
    ("seconds", "text"), [(40.2, "40 s"), (720, "12 min"), (12_000, "3 h 20 min"), (89.9, "90 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_synth_lines_come_seldom_and_say_when_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with SynthDisplay() as display:
        for done in range(51):
            display(SynthProgress("answers", done, 50, done * 10, None if done < 10 else 100.0 - done))
        display(SynthProgress("answers", 50, 50, 500, 0.0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "0 of 50 prompts answered",
        "50 of 50 prompts answered",
    ]
    with SynthDisplay(quiet=True) as display:
        display(SynthProgress("prompts", 0, 1))
    assert capsys.readouterr().err == ""


def test_synth_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with SynthDisplay() as display:
        display(SynthProgress("prompts", 0, 1))
        display(SynthProgress("answers", 3, 9, 30, 200.0))
        (task,) = display._bar.tasks
    assert (task.completed, task.total, task.description) == (3, 9, "answering")
    assert "about 3 min left" in task.fields["detail"]
