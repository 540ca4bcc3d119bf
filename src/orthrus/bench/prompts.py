"""What benchmarks ask: forty prompts of our own over five domains, or a JSONL file of the user's."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from orthrus.errors import UserInputError

DOMAINS = ("math", "code", "chat", "creative", "summary")
NO_DOMAIN = "other"


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """`prompt`: text (one user turn) or chat messages. `domain`: what reports group by."""

    prompt: str | list[dict[str, str]]
    domain: str = NO_DOMAIN


def load_prompts(
    path: Path | None = None, domains: Sequence[str] = (), limit: int | None = None
) -> list[BenchPrompt]:
    """The prompts of a JSONL file, or the built-in ones.

    Args:
        path: one JSON object per line with `prompt` (text), `messages` (role and content each) or `turns` (a
            list of texts, of which only the first is asked), and optionally `domain`.
        domains: keep only these; all when empty.
        limit: keep at most so many of each domain.

    Raises:
        UserInputError: no such file, a bad line (named), an unknown domain, or nothing left.
    """
    if limit is not None and limit < 1:
        raise UserInputError(f"the limit of prompts per domain must be at least 1, not {limit}.")
    prompts = list(_parse(*_read(path)))
    known = {p.domain for p in prompts}
    for domain in domains:
        if domain not in known:
            there = ", ".join(sorted(known))
            raise UserInputError(f"no prompt belongs to domain '{domain}'; there are {there}.")
    seen: Counter[str] = Counter()
    kept = []
    for prompt in prompts:
        seen[prompt.domain] += 1
        if (not domains or prompt.domain in domains) and (limit is None or seen[prompt.domain] <= limit):
            kept.append(prompt)
    return kept


def _read(path: Path | None) -> tuple[str, str]:
    """(name to show in errors, text)."""
    if path is None:
        return "built-in prompts", files("orthrus.bench").joinpath("prompts.jsonl").read_text(
            encoding="utf-8"
        )
    try:
        return str(path), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
        raise UserInputError(f"cannot read the prompts in {path} ({reason}); give a JSONL file.") from e


def _parse(name: str, text: str) -> Iterator[BenchPrompt]:
    found = False
    # Not splitlines(): JSON strings may hold its other line separators as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            found = True
            try:
                yield _prompt(json.loads(line))
            except json.JSONDecodeError as e:
                raise UserInputError(f"{name}, line {number}: no valid JSON ({e.msg}).") from e
            except UserInputError as e:
                raise UserInputError(f"{name}, line {number}: {e}") from e
    if not found:
        raise UserInputError(f"{name} holds no prompts; write one JSON object per line, with a 'prompt'.")


def _prompt(record: Any) -> BenchPrompt:
    if not isinstance(record, dict):
        raise UserInputError("each line must be a JSON object with 'prompt', 'messages' or 'turns'.")
    domain = record.get("domain", NO_DOMAIN)
    if not isinstance(domain, str) or not domain:
        raise UserInputError("'domain' must be a text.")
    given = [key for key in ("prompt", "messages", "turns") if key in record]
    if len(given) != 1:
        raise UserInputError("give exactly one of 'prompt', 'messages' and 'turns'.")
    value = record[given[0]]
    if given[0] == "messages":
        return BenchPrompt(_messages(value), domain)
    if given[0] == "turns":
        value = value[0] if isinstance(value, list) and value else None
    if not isinstance(value, str) or not value.strip():
        raise UserInputError(f"'{given[0]}' must hold some text.")
    return BenchPrompt(value, domain)


def _messages(value: Any) -> list[dict[str, str]]:
    sound = isinstance(value, list) and value and all(_is_message(message) for message in value)
    if not sound:
        raise UserInputError("'messages' must be a list of objects with the texts 'role' and 'content'.")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
