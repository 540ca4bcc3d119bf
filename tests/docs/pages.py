"""What tests read from pages."""

import re
from pathlib import Path


def code_blocks(page: Path, language: str) -> list[str]:
    """The code of a page that is fenced as of this language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
