"""What shapes share that write an answer as items: texts and calls, each of which begins, grows and ends."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from orthrus.server.call_reader import CallPiece, CallReader, Piece
from orthrus.server.shapes import About
from orthrus.types import Cycle


class ItemShape(ABC):
    """One answer as items. See `Shape`."""

    def __init__(self, about: About) -> None:
        self._about = about
        self._reader = CallReader() if about.has_calls else None

    def add(self, index: int, cycle: Cycle) -> Iterator[bytes]:
        yield from self._grow(Piece(cycle.text) if self._reader is None else self._reader.feed(cycle.text))

    def end(self, index: int) -> Iterator[bytes]:
        yield from self._rest()
        yield from self._finish()

    def close(self) -> Iterator[bytes]:
        return iter(())

    def _rest(self) -> Iterator[bytes]:
        """What was held back of the text."""
        if self._reader is not None:
            yield from self._grow(self._reader.flush())

    def _grow(self, piece: Piece) -> Iterator[bytes]:
        if piece.content:
            yield from self._grow_text(piece.content)
        for call in piece.calls:
            yield from self._grow_call(call)

    @abstractmethod
    def _grow_text(self, text: str) -> Iterator[bytes]:
        """More text, in the item that grows or in a new one."""

    @abstractmethod
    def _grow_call(self, piece: CallPiece) -> Iterator[bytes]:
        """More of a call; where the piece has a name the call begins."""

    @abstractmethod
    def _finish(self) -> Iterator[bytes]:
        """The last item ends, and the answer with it."""
