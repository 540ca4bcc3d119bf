"""Event streams of servers (text/event-stream), read piece by piece as they come."""

from collections.abc import Iterable, Iterator


class EventData:
    """Takes a stream in pieces of any size and gives what its events hold.

    Lines end with a line feed alone: JSON may hold other separators as they are, which libraries take for ends of
    lines. Comments and the names of events are left out. Not for use by two threads at once.
    """

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, piece: str) -> Iterator[str]:
        """The data lines that are complete now."""
        *lines, self._rest = (self._rest + piece).split("\n")
        yield from map(_data, filter(_is_data, lines))

    def flush(self) -> Iterator[str]:
        """A last line without an end, once nothing more will come."""
        line, self._rest = self._rest, ""
        if _is_data(line):
            yield _data(line)


def event_data(pieces: Iterable[str]) -> Iterator[str]:
    """What the events of a whole stream hold."""
    reader = EventData()
    for piece in pieces:
        yield from reader.feed(piece)
    yield from reader.flush()


def _is_data(line: str) -> bool:
    return line.startswith("data:")


def _data(line: str) -> str:
    return line.removeprefix("data:").strip()
