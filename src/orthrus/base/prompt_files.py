"""Prompts in JSONL files, as benchmarks and corpora read them: one JSON object a line."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthrus.base.json_text import parse_json
from orthrus.errors import UserInputError

_KEYS = ("prompt", "messages", "turns")


@dataclass(frozen=True, slots=True)
class FilePrompt:
    """`prompt`: text (one user turn) or chat messages. `domain` None: the line has none. `line`: from 1.

    more_turns: the user turns behind the first one, of a line with `turns`.
    """

    prompt: str | list[dict[str, str]]
    domain: str | None
    line: int
    more_turns: tuple[str, ...] = ()


def is_domain(value: object) -> bool:
    """Whether this may name a domain in reports and on cards: printable text, not too long."""
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def read_prompt_file(path: Path) -> list[FilePrompt]:
    """The prompts of a JSONL file: `prompt` (text), `messages` (role and content each) or `turns` (a list of
    user texts) on each line, and optionally `domain`.

    Raises UserInputError for a file that cannot be read or holds no prompts, and for a bad line, named.
    """
    try:
        # A byte order mark is none of the text.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
        raise UserInputError(f"cannot read the prompts in {path} ({reason}); give a JSONL file.") from e
    return list(parse_prompts(str(path), text))


def parse_prompts(name: str, text: str) -> Iterator[FilePrompt]:
    """As `read_prompt_file`, of text; `name` is for messages."""
    found = False
    # Not splitlines(): JSON strings may hold its other line separators as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            found = True
            try:
                yield _prompt(parse_json(line), number)
            except ValueError as e:
                reason = getattr(e, "msg", "numbers or nesting beyond all bounds")
                raise UserInputError(
                    f"{name}, line {number}: no valid JSON ({reason}); mend or delete that line."
                ) from e
            except UserInputError as e:
                raise UserInputError(f"{name}, line {number}: {e}") from e
    if not found:
        raise UserInputError(f"{name} holds no prompts; write one JSON object per line, with a 'prompt'.")


def _prompt(record: Any, line: int) -> FilePrompt:
    if not isinstance(record, dict):
        raise UserInputError("each line must be a JSON object with 'prompt', 'messages' or 'turns'.")
    domain = record.get("domain")
    if domain is not None and not is_domain(domain):
        raise UserInputError("'domain' must be a printable text of at most 200 characters.")
    given = [key for key in _KEYS if key in record]
    if set(given) == {"prompt", "turns"}:
        # HumanEval's lines keep the code to be completed beside the turn that asks for it.
        given = ["turns"]
    if len(given) != 1:
        raise UserInputError("give exactly one of 'prompt', 'messages' and 'turns'.")
    value = record[given[0]]
    if given[0] == "messages":
        return FilePrompt(_messages(value), domain, line)
    turns = value if given[0] == "turns" else [value]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise UserInputError(f"'{given[0]}' must hold some text.")
    for turn in turns:
        _require_text(turn)
    return FilePrompt(turns[0], domain, line, tuple(turns[1:]))


def _require_text(value: str) -> None:
    """JSON may write down half a character, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserInputError(f"the text is no valid Unicode ({e.reason}); mend its \\u escapes.") from e


def _messages(value: Any) -> list[dict[str, str]]:
    sound = isinstance(value, list) and value and all(_is_message(message) for message in value)
    if not sound:
        raise UserInputError("'messages' must be a list of objects with the texts 'role' and 'content'.")
    for message in value:
        _require_text(message["role"] + message["content"])
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
