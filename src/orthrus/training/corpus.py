"""A corpus on disk: prompts, then shards of answers, each written whole, so that work can stop anywhere.

Layout of a corpus folder: `manifest.json` (provenance), `prompts.jsonl` (one {"prompt_ids", "domain"} a
line), `answers-00000.jsonl`, ... (one {"prompt", "answer_ids", "finished"} a line).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthrus.base.outputs import write_text_atomic
from orthrus.errors import CorruptFileError, UserInputError

MANIFEST = "manifest.json"
PROMPTS = "prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Sample:
    """One dialogue: the prompt's ids, through the chat template, and the base's own answer."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    domain: str


def normalised(text: str) -> str:
    """Lower-case words and numbers only: what counts as the same text."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def read_prompt_texts(file: Path, domain: str | None = None) -> list[tuple[str, str]]:
    """(text, domain) of each line of a JSONL file with `prompt`, `turns` or `messages`; first user turn only.

    Raises UserInputError naming file and line for anything else, and for a file without prompts.
    """
    if not file.is_file():
        raise UserInputError(f"there is no prompt file {file}; check the path.")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as e:
        raise UserInputError(f"{file} is not UTF-8 text ({e.reason}); save it as UTF-8.") from e
    found: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = _first_user_turn(record)
        except (ValueError, TypeError, AttributeError) as e:
            raise UserInputError(f"{file}, line {number}: not a JSON object with a prompt ({e}).") from e
        if text is None:
            raise UserInputError(
                f"{file}, line {number}: no user turn; give `prompt`, `turns` or `messages`."
            )
        found.append((text, str(domain or record.get("domain") or "other")))
    if not found:
        raise UserInputError(f"{file} holds no prompts; give one JSON object a line.")
    return found


def _first_user_turn(record: dict[str, Any]) -> str | None:
    if isinstance(record.get("prompt"), str):
        return str(record["prompt"])
    if isinstance(record.get("turns"), list) and record["turns"]:
        return str(record["turns"][0])
    users = [m["content"] for m in record.get("messages", ()) if m.get("role") == "user"]
    return str(users[0]) if users else None


class Unseen:
    """Lets each text pass once, and none that repeats or contains a held-out one."""

    def __init__(self, held_out: Iterable[str] = ()) -> None:
        self._held_out = {normalised(text) for text in held_out} - {""}
        self._seen: set[str] = set()

    def __call__(self, text: str) -> bool:
        key = normalised(text)
        if not key or key in self._seen or any(key in held or held in key for held in self._held_out):
            return False
        self._seen.add(key)
        return True


def write_jsonl(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a whole JSONL file in one step."""
    write_text_atomic(file, "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records))


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Read a JSONL file; CorruptFileError names file and line."""
    records: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except ValueError as e:
            raise CorruptFileError(
                f"{file}, line {number} is not JSON; delete the file and run synth again."
            ) from e
    return records


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"answers-{index:05d}.jsonl"


def load_corpus(folder: Path) -> list[Sample]:
    """All answered prompts of a corpus folder, in the prompts' order.

    Raises UserInputError when there is no corpus or it is empty.
    """
    if not (folder / PROMPTS).is_file():
        raise UserInputError(
            f"{folder} holds no corpus ({PROMPTS} is missing); make one with `orthrus synth`."
        )
    prompts = read_jsonl(folder / PROMPTS)
    samples = [
        Sample(
            tuple(prompts[r["prompt"]]["prompt_ids"]), tuple(r["answer_ids"]), prompts[r["prompt"]]["domain"]
        )
        for file in sorted(folder.glob("answers-*.jsonl"))
        for r in read_jsonl(file)
        if r["answer_ids"]
    ]
    if not samples:
        raise UserInputError(
            f"the corpus in {folder} is empty: there is no answer yet, or each one went round in circles; "
            "run `orthrus synth` again, with more prompts if need be."
        )
    return samples


def corpus_sources(folder: Path) -> list[str]:
    """Where a corpus's prompts came from, one phrase a source; empty when its manifest does not say."""
    try:
        sources = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["settings"]["sources"]
        places = ["the model itself" if s["file"] is None else Path(s["file"]).name for s in sources]
        return [f"{p} ({s['domain']})" if s["domain"] else p for p, s in zip(places, sources, strict=True)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def corpus_digest(samples: Sequence[Sample]) -> str:
    """A short name for exactly these samples, so that a resumed run can tell that its data changed."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(repr((sample.prompt_ids, sample.answer_ids)).encode())
    return f"blake2b:{digest.hexdigest()}"
