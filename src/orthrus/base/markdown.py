"""Tables in Markdown, for every report, card and page."""

from collections.abc import Iterable, Sequence

_RULES = {"l": "---", "r": "---:"}


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]], align: str = "") -> str:
    """A table in GitHub's form, without a line end; bars and line ends in a cell cannot break it.

    align: a letter a column, "l" or "r"; columns without one are left-aligned.
    """
    rules = [_RULES[letter] for letter in align.ljust(len(header), "l")]
    lines = [map(_escaped, header), rules, *(map(_escaped, line) for line in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")
