"""A corpus on disk: prompts, then shards of answers, each written whole, so that work can stop anywhere.

Layout of a corpus folder: `manifest.json` (provenance), `source-00.jsonl`, ... (one {"prompt", "domain"} a
line, a file for each source of prompts), `prompts.jsonl` (one {"prompt_ids", "domain", "prompt"} a line: what
is left of all sources, and the text that the ids hold), `answers-00000.jsonl`, ... (one {"prompt",
"answer_ids", "finished"} a line; of dialogues of several turns with "spans" besides; without ids, and with
"left_out", where a server's answer could not be kept).
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from orthrus.base.outputs import write_text_atomic
from orthrus.base.prompt_files import is_domain
from orthrus.errors import CorruptFileError, StorageError, UserInputError
from orthrus.training.manifest import base_fingerprint

PROMPTS = "prompts.jsonl"
# More than any vocabulary has; what a base knows is checked when it is loaded.
MOST_IDS = 2**31


@dataclass(frozen=True, slots=True)
class Sample:
    """One dialogue: the prompt's ids, through the chat template, and the base's own answer.

    Of several turns, answer_ids holds all that comes after the first prompt, and spans which parts of it
    (start, end) the base answered; the others are the user's. No spans: all of it is one answer.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    domain: str
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def answer_spans(self) -> tuple[tuple[int, int], ...]:
        return self.spans or ((0, len(self.answer_ids)),)

    @property
    def num_answered(self) -> int:
        """Tokens that the base wrote."""
        return sum(end - start for start, end in self.answer_spans)


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
    """Read a JSONL file; CorruptFileError names file and line, StorageError the file that cannot be read."""
    records: list[dict[str, Any]] = []
    try:
        content = file.read_bytes()
    except OSError as e:
        raise StorageError(
            f"{file} cannot be read ({e.strerror or e}); it should be a file of the corpus."
        ) from e
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise _damaged(file, number, "is not a JSON object") from e
        if not isinstance(record, dict):
            raise _damaged(file, number, "is not a JSON object")
        records.append(record)
    return records


def read_source(file: Path) -> list[dict[str, Any]]:
    """The texts of one source, each {"prompt", "domain"}; CorruptFileError names file and line."""
    records = read_jsonl(file)
    for number, record in enumerate(records, 1):
        if not isinstance(record.get("prompt"), str) or not is_domain(record.get("domain")):
            raise _damaged(file, number, "has no texts 'prompt' and 'domain'")
    return records


def read_prompts(folder: Path) -> list[dict[str, Any]]:
    """The prompts of a corpus, each {"prompt_ids", "domain"} and, of most, "prompt", their text.

    CorruptFileError names file and line.
    """
    file = folder / PROMPTS
    records = read_jsonl(file)
    for number, record in enumerate(records, 1):
        if not _are_ids(record.get("prompt_ids")) or not record["prompt_ids"]:
            raise _damaged(file, number, "has no list of token ids 'prompt_ids'")
        if not is_domain(record.get("domain")):
            raise _damaged(file, number, "has no text 'domain'")
        if not isinstance(record.get("prompt", ""), str):
            raise _damaged(file, number, "has a 'prompt' that is no text")
    return records


def _are_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < MOST_IDS for i in value)


def _damaged(file: Path, line: int, what: str) -> CorruptFileError:
    return CorruptFileError(f"{file}, line {line} {what}; delete the file and run synth again.")


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
    prompts = read_prompts(folder)
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


def left_out(folder: Path) -> dict[str, int]:
    """Why servers' answers were left out, and how many of them."""
    reasons = (r.get("left_out") for file in sorted(folder.glob("answers-*.jsonl")) for r in read_jsonl(file))
    return dict(Counter(str(reason) for reason in reasons if reason))


def _samples(file: Path, prompts: list[dict[str, Any]]) -> list[Sample]:
    samples = []
    for number, record in enumerate(read_jsonl(file), 1):
        which, answer_ids = record.get("prompt"), record.get("answer_ids")
        if type(which) is not int or not 0 <= which < len(prompts):
            raise _damaged(file, number, f"answers no prompt of {PROMPTS} beside it")
        if not _are_ids(answer_ids):
            raise _damaged(file, number, "has no list of token ids 'answer_ids'")
        spans = record.get("spans", [])
        if not _are_spans(spans, len(answer_ids)):
            raise _damaged(file, number, "has 'spans' that are not parts of its 'answer_ids', in order")
        prompt = prompts[which]
        samples.append(
            Sample(
                tuple(prompt["prompt_ids"]),
                tuple(answer_ids),
                prompt["domain"],
                tuple((start, end) for start, end in spans),
            )
        )
    return samples


def _are_spans(value: object, length: int) -> bool:
    """Whether these are pairs (start, end) of parts that are not empty and do not overlap, in order."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return False
    edges = [edge for pair in value for edge in pair]
    if not all(type(edge) is int for edge in edges):
        return False
    in_order = all(start < end for start, end in value) and edges == sorted(edges)
    return in_order and (not edges or (edges[0] >= 0 and edges[-1] <= length))


def load_corpora(folders: Sequence[str]) -> dict[str, list[Sample]]:
    """The samples of each folder. Several must be answers of one base.

    Raises UserInputError when they are of different bases or one does not say of which, and as `load_corpus`.
    """
    paths = {folder: Path(os.path.expanduser(folder)) for folder in folders}
    found = {folder: load_corpus(path) for folder, path in paths.items()}
    if len(folders) > 1:
        bases = {folder: base_fingerprint(path) for folder, path in paths.items()}
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
        content = (sample.prompt_ids, sample.answer_ids)
        digest.update(repr((*content, sample.spans) if sample.spans else content).encode())
    return f"blake2b:{digest.hexdigest()}"
