"""Structured output: the options of the command line, and the grammar that they mean."""

from pathlib import Path
from typing import Annotated

import typer

from orthrus.base.paths import expanded
from orthrus.config import LONGEST_GRAMMAR, Grammar
from orthrus.errors import UserInputError

_PANEL = "Structured output"

JsonSchema = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|JSON",
        help="The answer is JSON that fits this JSON Schema: a file, or the schema itself, which begins with {.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Regex = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN",
        help="The whole answer matches this regular expression.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
LarkGrammar = Annotated[
    Path | None,
    typer.Option(
        "--grammar",
        metavar="FILE",
        help="The answer fits this context-free grammar, in llguidance's dialect of Lark, with the rule start.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
CompactJson = Annotated[
    bool,
    typer.Option(
        "--compact-json",
        help="JSON has no whitespace between its parts: fewer tokens.",
        rich_help_panel=_PANEL,
    ),
]


def grammar_of(
    json_schema: str | None, regex: str | None, grammar: Path | None, *, compact: bool
) -> Grammar | None:
    """The grammar that an answer must follow; None for any text.

    Raises UserInputError for several grammars, or for a file that holds no text.
    """
    given = [
        name
        for name, value in (("--json-schema", json_schema), ("--regex", regex), ("--grammar", grammar))
        if value is not None
    ]
    if len(given) > 1:
        raise UserInputError(f"{' and '.join(given)} exclude each other; give one.")
    if compact and json_schema is None:
        raise UserInputError("--compact-json is for JSON; give --json-schema too.")
    if json_schema is not None:
        is_schema = json_schema.lstrip().startswith("{")
        return Grammar("json_schema", json_schema if is_schema else _file_text(Path(json_schema)), compact)
    if regex is not None:
        return Grammar("regex", regex)
    return None if grammar is None else Grammar("lark", _file_text(grammar))


def _file_text(file: Path) -> str:
    """The text of a grammar's file, cut off a little beyond the length limit of a grammar."""
    name = str(file) if len(str(file)) <= 200 else f"{str(file)[:200]} ..."
    try:
        with expanded(file).open(encoding="utf-8-sig") as content:
            return content.read(LONGEST_GRAMMAR + 1)
    except UnicodeDecodeError as e:
        raise UserInputError(f"{name} is no UTF-8 text; give a file that holds the schema or grammar.") from e
    except (OSError, ValueError) as e:
        reason = (e.strerror if isinstance(e, OSError) else None) or str(e)
        raise UserInputError(
            f"{name} cannot be read ({reason}); name the file with the schema or grammar."
        ) from e
