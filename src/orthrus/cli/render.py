"""Output on the screen: streamed text, marks on drafted tokens, statistics."""

import json
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from orthrus.base.prompt_files import FilePrompt
from orthrus.base.text import printable
from orthrus.cli.wrap import WordWrap
from orthrus.types import Cycle, DecodeStats, GenerationResult

_UPPER_CONTROL = re.compile(r"[\x7f-\x9f]")
_UNDERLINE, _CYAN_UNDERLINE, _RESET = "\x1b[4m", "\x1b[4;36m", "\x1b[0m"


def out(text: str) -> None:
    """Write a part of the result to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(content: Any) -> None:
    # JSON escapes the lower control characters itself. Escaping the upper ones does not change the value.
    out(
        _UPPER_CONTROL.sub(lambda c: f"\\u{ord(c[0]):04x}", json.dumps(content, indent=2, ensure_ascii=False))
    )
    out("\n")


def counted(number: int, one: str) -> str:
    """A number and its noun: "1 turn", "2 turns", "2 passes"."""
    many = f"{one}es" if one.endswith("s") else f"{one}s"
    return f"{number} {one if number == 1 else many}"


def note(text: str) -> None:
    """Print a remark to stderr, dimmed on a terminal."""
    text = printable(text)
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        text = f"\x1b[2m{text}{_RESET}"
    print(text, file=sys.stderr, flush=True)


def note_turns(file: Path, prompts: Sequence[FilePrompt]) -> None:
    """Print a remark if a command uses only the first of several user turns."""
    if several := sum(bool(prompt.more_turns) for prompt in prompts):
        has = "has" if several == 1 else "have"
        note(f"{counted(several, 'line')} of {file} {has} several turns: only the first turn counts")


def footer(stats: DecodeStats, finish_reason: str) -> str:
    """Two lines of statistics, each ratio beside its numbers. One line if a server does not report passes."""
    times = (
        f"{counted(stats.num_tokens, 'token')} in {stats.seconds:.2f} s ({finish_reason}) · "
        f"{stats.tokens_per_second:.1f} tokens/s · first token after {stats.ttft_ms:.0f} ms"
    )
    if not stats.num_passes:
        return times
    return (
        f"{times}\ntokens per cycle {stats.tokens_per_cycle:.2f} = {max(stats.num_tokens - 1, 0)} after the first / "
        f"{counted(stats.num_cycles, 'cycle')} · tokens per forward {stats.tokens_per_forward:.2f} = "
        f"{stats.num_tokens} / {counted(stats.num_passes, 'pass')} · "
        f"acceptance rate {stats.acceptance_rate:.0%} = {stats.num_accepted} / {counted(stats.num_drafted, 'draft')}"
    )


def print_stream(cycles: Iterable[Cycle], marker: "DraftMarker | None" = None) -> None:
    """Write the text of cycles to stdout on arrival, and end the line. A terminal gets whole words."""
    last = ""
    wrap = WordWrap() if sys.stdout.isatty() else None
    try:
        for cycle in cycles:
            last = cycle.text or last
            text = printable(cycle.text) if marker is None else marker.mark(cycle)
            out(text if wrap is None else wrap.feed(text))
    finally:
        if wrap is not None:
            out(wrap.end())
    out("" if last.endswith("\n") else "\n")


def print_result(result: GenerationResult, marker: "DraftMarker | None" = None) -> None:
    """The same for a complete answer."""
    print_stream(result.cycles, marker)


class DraftMarker:
    """Underlines the text of drafted tokens, in colour too unless NO_COLOR forbids it.

    A cycle's text may lag behind its tokens, so who wrote what is kept per character until it is shown.
    """

    def __init__(self, tokenizer: Any) -> None:
        from orthrus.engine.detokenize import Detokenizer

        self._detokenizer = Detokenizer(tokenizer)
        self._drafted: deque[bool] = deque()
        self._start = _UNDERLINE if os.environ.get("NO_COLOR") else _CYAN_UNDERLINE

    @property
    def legend(self) -> str:
        return f"{self._start}underlined{_RESET}: drafted and accepted; the rest is the AR view's own."

    def mark(self, cycle: Cycle) -> str:
        """The cycle's text with escape codes around drafted tokens."""
        for token_id, is_draft in zip(cycle.token_ids, cycle.is_draft, strict=True):
            self._drafted.extend([is_draft] * len(self._detokenizer.push(token_id)))
        marked, open_mark = "", False
        for character in cycle.text:
            # Bytes that make no character are shown at the end, and count as the AR view's own.
            is_draft = self._drafted.popleft() if self._drafted else False
            # A line break ends the mark, because some terminals would underline the rest of the line.
            is_draft = is_draft and character != "\n"
            if is_draft != open_mark:
                marked += self._start if is_draft else _RESET
                open_mark = is_draft
            marked += printable(character)
        return marked + (_RESET if open_mark else "")
