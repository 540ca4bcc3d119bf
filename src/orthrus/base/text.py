"""Text from files, prompts and models, made fit to be shown."""

import re

# All control characters but the line end and the tab: a terminal would obey them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""The text with control characters written out, as in `\x1b`; line ends and tabs stay."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
