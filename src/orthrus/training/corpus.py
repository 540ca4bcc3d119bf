"""A corpus on disk: prompts, then shards of answers, each written whole, so that work can stop anywhere.

Layout of a corpus folder: `manifest.json` (provenance), `source-00.jsonl`, ... (one {"prompt", "domain"} a
line, a file for each source of prompts), `prompts.jsonl` (one {"prompt_ids", "domain"} a line: what is left
of all sources), `answers-00000.jsonl`, ... (one {"prompt", "answer_ids", "finished"} a line).
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
from orthrus.training.manifest import base_fingerprint

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
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError) as e:
            raise CorruptFileError(
                f"{file}, line {number} is not a JSON object; delete the file and run synth again."
            ) from e
    return records


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"answers-{index:05d}.jsonl"


def source_path(folder: Path, index: int) -> Path:
    return folder / f"source-{index:02d}.jsonl"


def load_corpus(folder: Path) -> list[Sample]:
    """All answered prompts of a corpus folder, in the prompts' order.

    Raises UserInputError when there is no corpus or it is empty, CorruptFileError when a file is damaged.
    """
    if not (folder / PROMPTS).is_file():
        raise UserInputError(
            f"{folder} holds no corpus ({PROMPTS} is missing); make one with `orthrus synth`."
        )
    prompts = read_jsonl(folder / PROMPTS)
    samples = [
        sample
        for file in sorted(folder.glob("answers-*.jsonl"))
        for sample in _samples(file, prompts)
        if sample.answer_ids
    ]
    if not samples:
        raise UserInputError(
            f"the corpus in {folder} is empty: there is no answer yet, or each one went round in circles; "
            "run `orthrus synth` again, with more prompts if need be."
        )
    return samples


def _samples(file: Path, prompts: list[dict[str, Any]]) -> list[Sample]:
    try:
        return [
            Sample(
                tuple(prompts[r["prompt"]]["prompt_ids"]),
                tuple(r["answer_ids"]),
                prompts[r["prompt"]]["domain"],
            )
            for r in read_jsonl(file)
        ]
    except (KeyError, IndexError, TypeError) as e:
        raise CorruptFileError(
            f"{file} does not fit {PROMPTS} beside it; delete the file and run synth again."
        ) from e


def load_corpora(folders: Sequence[str]) -> dict[str, list[Sample]]:
    """The samples of each folder. Several must be answers of one base.

    Raises UserInputError when they are of different bases or one does not say of which, and as `load_corpus`.
    """
    found = {folder: load_corpus(Path(folder).expanduser()) for folder in folders}
    if len(folders) > 1:
        bases = {folder: base_fingerprint(Path(folder).expanduser()) for folder in folders}
        for folder, base in bases.items():
            if base is None:
                raise UserInputError(
                    f"the corpus in {folder} does not say which base answered, so it cannot be mixed with "
                    "others; make it again with `orthrus synth`."
                )
            if base != bases[folders[0]]:
                raise UserInputError(
                    f"the corpora in {folders[0]} and {folder} are answers of different bases "
                    f"({bases[folders[0]]} and {base}); train on corpora of one base."
                )
    return found


def corpus_digest(samples: Sequence[Sample]) -> str:
    """A short name for exactly these samples, so that a resumed run can tell that its data changed."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(repr((sample.prompt_ids, sample.answer_ids)).encode())
    return f"blake2b:{digest.hexdigest()}"
