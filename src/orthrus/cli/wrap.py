"""Text that streams to a terminal, broken between words."""

import re
import shutil
from collections.abc import Callable

# The escape codes of our own marks, line ends, blanks, and what stands between them.
_PARTS = re.compile(r"\x1b\[[\d;]*m|\n|[ \t]+|[^\s\x1b]+|.", re.DOTALL)
_TAB = 8


def terminal_width() -> int:
    return shutil.get_terminal_size().columns


class WordWrap:
    """Breaks lines between words; a word waits until its end is known.

    Escape codes take no room. Wide characters, as in Chinese, may be broken before and after each. A word that is
    longer than a line is left to the terminal. width: called for each piece, since a window may be resized.
    """

    def __init__(self, width: Callable[[], int] = terminal_width) -> None:
        self._width = width
        self._column = 0
        self._blanks = self._word = ""
        self._word_cells = 0

    def feed(self, text: str) -> str:
        """What may be shown now."""
        shown = ""
        for part in _PARTS.findall(text):
            if part.startswith("\x1b"):
                self._word += part
            elif part == "\n":
                # Blanks before a line end would show nowhere.
                shown += self._placed() + "\n"
                self._column, self._blanks = 0, ""
            elif part.isspace():
                shown += self._placed()
                self._blanks += part
            else:
                shown += self._add(part)
        return shown

    def end(self) -> str:
        """What is left; call it once, behind all text."""
        shown = self._placed() + self._blanks
        self._blanks = ""
        return shown

    def _add(self, part: str) -> str:
        from rich.cells import cell_len

        if part.isascii():
            self._word += part
            self._word_cells += len(part)
            return ""
        shown = ""
        for character in part:
            cells = cell_len(character)
            shown += self._placed() if cells > 1 else ""
            self._word += character
            self._word_cells += cells
            shown += self._placed() if cells > 1 else ""
        return shown

    def _placed(self) -> str:
        """The waiting word, behind its blanks or on a new line."""
        word, cells, blanks = self._word, self._word_cells, self._blanks
        if not word:
            return ""
        self._word, self._word_cells = "", 0
        if not cells:
            # Escape codes alone: what they mark comes later, behind the same blanks.
            return word
        width = self._width()
        at = self._column
        for blank in blanks:
            at += _TAB - at % _TAB if blank == "\t" else 1
        self._blanks = ""
        if self._column and at + cells > width and cells <= width:
            self._column = cells
            return f"\n{word}"
        self._column = (at + cells) % width if at + cells > width else at + cells
        return blanks + word
