"""What a training run shows on stderr: a live panel on a terminal, plain lines anywhere else."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from orthrus.cli.synth import duration

if TYPE_CHECKING:
    from orthrus.training.trainer import TrainLog

_BARS = " ▁▂▃▄▅▆▇█"


class TrainDisplay:
    """A context manager that shows logs and evaluation scores."""

    def __init__(self, title: str, *, quiet: bool = False, peak_flops: float | None = None) -> None:
        self._title, self._quiet, self._peak_flops = title, quiet, peak_flops
        self._log: TrainLog | None = None
        self._scores: list[tuple[int, float]] = []
        self._state = "first step"
        self._is_stopping = False
        self._live: Any = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=2)

    def __enter__(self) -> "TrainDisplay":
        if self._live is not None:
            self._live.start()
            self._refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._state = "stopped" if kind is not None else "done"
            self._refresh()
            self._live.stop()

    def start(self, step: int, num_steps: int) -> None:
        if step:
            self._say(f"going on after step {step} of {num_steps}")

    def log(self, log: "TrainLog") -> None:
        self._log = log
        self._set("training")
        if self._live is None:
            self._say(log_line(log, self._peak_flops))
        self._refresh()

    def scoring(self, done: int = 0, total: int | None = None) -> None:
        """done: tokens of this process's held-out prompts, which have `total` at most."""
        what = "decoding held-out prompts"
        if self._live is None and not done:
            self._say(f"{what} (the time left does not count this)")
        tokens = f", {done:,} tokens of {total:,} at most" if total else ""
        self._set(f"{what}{tokens} (the time left does not count this)")
        self._refresh()

    def score(self, step: int, value: float, best: bool) -> None:
        self._scores.append((step, value))
        self._set("training")
        if self._live is None:
            praise = " (best so far)" if best else ""
            self._say(f"step {step}: {value:.2f} tokens per cycle on held-out prompts{praise}")
        self._refresh()

    def stopping(self) -> None:
        self._state = (
            "stopping after this step and its decodes; a second signal leaves at once, back to the last save"
        )
        self._is_stopping = True
        if self._live is None:
            self._say(self._state)
        self._refresh()

    def _set(self, state: str) -> None:
        """Show the current stage. After a stop was requested, keep showing that until the run ends."""
        if not self._is_stopping:
            self._state = state

    def _say(self, line: str) -> None:
        if not self._quiet:
            if self._live is not None:
                self._live.console.print(line, highlight=False)
            else:
                print(line, file=sys.stderr, flush=True)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._panel())

    def _panel(self) -> Any:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        log = self._log
        if log is not None:
            left = f"about {duration(log.seconds_left)} left" if log.step < log.num_steps else ""
            table.add_row("step", f"{log.step:,} of {log.num_steps:,}  {left}")
            table.add_row("", ProgressBar(total=log.num_steps, completed=log.step, width=40))
            table.add_row("loss", f"{log.loss:.4f}")
            table.add_row("accuracy by position", positions(log))
            table.add_row("expected tokens per cycle", f"{log.expected_tokens:.2f}")
            rate = f"{_rate(log)}{share_of_peak(log, self._peak_flops)}"
            table.add_row("diffusion tokens/s", rate)
        if self._scores:
            step, last = self._scores[-1]
            best = max(self._scores, key=lambda s: s[1])
            table.add_row(
                "decoded tokens per cycle",
                f"{last:.2f} at step {step:,}, best {best[1]:.2f} at step {best[0]:,}",
            )
        return Panel(table, title=self._title, subtitle=self._state, expand=False)


def positions(log: "TrainLog") -> str:
    """A bar and a percentage for each draft position."""
    return " ".join(f"{_BARS[round(a * 8)]}{a:.0%}" for a in log.accuracy_J)


def share_of_peak(log: "TrainLog", peak_flops: float | None) -> str:
    """The operations of the steps as a share of the machine's best matrix product; empty if unknown.

    A share above 100 % means that the peak was measured too low, as in bfloat16 on a processor without instructions for
    it. Then the result is empty too.
    """
    if log.flops_per_second is None or not peak_flops or log.flops_per_second > peak_flops:
        return ""
    return f" ({log.flops_per_second / peak_flops:.0%} of the machine's peak)"


def log_line(log: "TrainLog", peak_flops: float | None = None) -> str:
    """The numbers of the panel in one line."""
    accuracy = " ".join(f"{a:.2f}" for a in log.accuracy_J)
    left = f", about {duration(log.seconds_left)} left" if log.step < log.num_steps else ""
    return (
        f"step {log.step}/{log.num_steps}: loss {log.loss:.4f}, expected tokens per cycle "
        f"{log.expected_tokens:.2f}, accuracy by position {accuracy}, "
        f"{_rate(log)} diffusion tokens/s{share_of_peak(log, peak_flops)}{left}"
    )


def _rate(log: "TrainLog") -> str:
    """Tokens per second; a small number has a decimal."""
    return f"{log.tokens_per_second:,.{0 if log.tokens_per_second >= 10 else 1}f}"
