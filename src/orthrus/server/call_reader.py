"""Parses function calls from an answer while it is being written."""

import re
from dataclasses import dataclass, field

from orthrus.base.json_text import parse_json
from orthrus.decoding.stopping import overlap
from orthrus.server.tools import AFTER_ARGUMENTS, BEFORE_ARGUMENTS, BEFORE_NAME, TAG

_OPENING = re.compile(re.escape(BEFORE_NAME) + r'("(?:[^"\\]|\\.)*")' + re.escape(BEFORE_ARGUMENTS))


@dataclass(slots=True)
class CallPiece:
    """A part of a call. name: set in the first part."""

    index: int
    name: str | None
    arguments: str


@dataclass(slots=True)
class Piece:
    """A part of an answer: text outside of calls, and parts of calls."""

    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.calls)


class CallReader:
    """Parses the text of one answer, fed in pieces of any size. The result depends only on the whole text.

    The text follows the grammar of `call_grammar`, and may end anywhere.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""
        self._arguments = ""
        # The reader's state: in text, between a tag and the arguments, in arguments, or between calls.
        self._read = self._in_text

    def feed(self, text: str) -> Piece:
        """The parts that are certain now."""
        self._held += text
        piece = Piece()
        while self._read(piece):
            pass
        return piece

    def flush(self) -> Piece:
        """The parts that were held back, at the end of the text."""
        piece = Piece()
        if self._read == self._in_text:
            piece.content = self._held
        elif self._read == self._in_arguments and not _is_json(self._arguments):
            self._emit_arguments(piece, self._held)
        self._held = ""
        return piece

    def _in_text(self, piece: Piece) -> bool:
        before, found, after = self._held.partition(TAG)
        if found:
            piece.content += before
            self._held, self._read = after, self._in_opening
            return True
        certain = len(self._held) - overlap(self._held, TAG)
        piece.content += self._held[:certain]
        self._held = self._held[certain:]
        return False

    def _in_opening(self, piece: Piece) -> bool:
        match = _OPENING.match(self._held)
        if match is None:
            return False
        piece.calls.append(CallPiece(self.num_calls, parse_json(match[1]), ""))
        self.num_calls += 1
        self._held, self._arguments, self._read = self._held[match.end() :], "", self._in_arguments
        return True

    def _in_arguments(self, piece: Piece) -> bool:
        before, found, after = self._held.partition(AFTER_ARGUMENTS)
        if found:
            self._emit_arguments(piece, before)
            self._held, self._read = after, self._between_calls
            return True
        certain = len(self._held) - overlap(self._held, AFTER_ARGUMENTS)
        self._emit_arguments(piece, self._held[:certain])
        self._held = self._held[certain:]
        return False

    def _between_calls(self, piece: Piece) -> bool:
        _, found, after = self._held.partition(TAG)
        if found:
            self._held, self._read = after, self._in_opening
        return bool(found)

    def _emit_arguments(self, piece: Piece, text: str) -> None:
        if not text:
            return
        self._arguments += text
        if not piece.calls:
            piece.calls.append(CallPiece(self.num_calls - 1, None, ""))
        piece.calls[-1].arguments += text


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True
