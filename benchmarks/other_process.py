"""A second process of a benchmark, which answers a line at a time."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any


@contextmanager
def served(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[Callable[[str], Any]]:
    """Python with these arguments, once it has printed "ready"; called with a line it gives the JSON list that
    the process prints for it. The process is killed at the end."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        answers, questions = process.stdout, process.stdin

        def ask(line: str) -> Any:
            questions.write(line + "\n")
            questions.flush()
            return json.loads(_line(answers, "["))

        try:
            _line(answers, "ready")
            yield ask
        finally:
            process.kill()


def _line(stream: IO[str], start: str) -> str:
    """The next line that begins so; libraries print lines of their own."""
    for line in stream:
        if line.startswith(start):
            return line
    raise RuntimeError("a measured process has ended")
