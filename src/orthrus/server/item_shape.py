"""The common part of formats that write an answer as items: texts and calls, each of which begins, grows and ends."""

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
        """The events for the end of the text that was held back."""
        if self._reader is not None:
            yield from self._grow(self._reader.flush())

    def _grow(self, piece: Piece) -> Iterator[bytes]:
        if piece.content:
            yield from self._grow_text(piece.content)
        for call in piece.calls:
            yield from self._grow_call(call)

    @abstractmethod
    def _grow_text(self, text: str) -> Iterator[bytes]:
        """The events for more text, in the open item or in a new one."""

    @abstractmethod
    def _grow_call(self, piece: CallPiece) -> Iterator[bytes]:
        """The events for a part of a call. A piece with a name begins the call."""

    @abstractmethod
    def _finish(self) -> Iterator[bytes]:
        """The events that end the last item and the answer."""
