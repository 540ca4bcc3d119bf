"""Progress on stderr: a bar or spinner on a terminal; anywhere else a plain line per stage, and one now and then."""

import sys
from time import monotonic
from types import TracebackType
from typing import Any

from orthrus.base.text import printable

BYTES = "bytes"
LINE_SECONDS = 30.0
"""Between two lines of one stage, where there is no terminal."""


class ProgressDisplay:
    """A context manager that is also the callback: `display(stage, done, total)`.

    unit: what `done` and `total` count; the bar names it, as in "2/5 prompts". A total of None means that
    nothing is counted: then there is a spinner. The bar vanishes from the terminal when it ends.
    """

    def __init__(self, *, quiet: bool = False, unit: str = BYTES) -> None:
        self._stage: str | None = None
        self._quiet, self._unit = quiet, unit
        self._last_line = 0.0
        self._bar: Any = None
        self._task: Any = None
        if not quiet and sys.stderr.isatty():
            self._bar = _bar(unit)

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if self._bar is not None:
            if stage != self._stage:
                self.spin(stage)
            self._bar.update(self._task, completed=done, total=total)
        elif not self._quiet:
            self._print(stage, done, total)
        self._stage = stage

    def _print(self, stage: str, done: int, total: int | None) -> None:
        now = monotonic()
        is_new = stage != self._stage
        if is_new:
            print(printable(stage), file=sys.stderr, flush=True)
        elif total and now - self._last_line >= LINE_SECONDS:
            far = f"{done / total:.0%}" if self._unit == BYTES else f"{done:,} of {total:,} {self._unit}"
            print(printable(f"{stage}: {far}"), file=sys.stderr, flush=True)
        else:
            return
        self._last_line = now

    def spin(self, stage: str) -> None:
        """Announce a stage of unknown length, on terminals only."""
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(printable(stage), total=None)


def _bar(unit: str) -> Any:
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Count(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{int(task.completed)}/{int(task.total or 0)} {unit}", style="progress.download")

    class WhenSized(ProgressColumn):
        """A column that stays empty while the total is unknown."""

        def __init__(self, inner: ProgressColumn) -> None:
            super().__init__()
            self.inner = inner

        def render(self, task: Task) -> RenderableType:
            return Text() if task.total is None else self.inner(task)

    amount = DownloadColumn() if unit == BYTES else Count()
    text = TextColumn("{task.description}", markup=False)
    return Progress(
        SpinnerColumn(),
        text,
        WhenSized(BarColumn(bar_width=30)),
        WhenSized(amount),
        WhenSized(TimeRemainingColumn()),
        console=Console(stderr=True),
        transient=True,
    )
