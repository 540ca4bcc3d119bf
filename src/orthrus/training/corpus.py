"""A corpus on disk: prompts and shards of answers. Each file is written in one step, so that work can stop at any time.

A corpus folder has these files:

* `manifest.json`: provenance.
* `source-00.jsonl`, ...: the prompts of each source, one {"prompt", "domain"} a line.
* `prompts.jsonl`: the prompts that are left of all sources, one {"prompt_ids", "domain", "prompt"} a line, where
  "prompt" is the text of the ids.
* `answers-00000.jsonl`, ...: one {"prompt", "answer_ids", "finished"} a line. Dialogues of several turns have "spans"
  too. If a server's answer could not be kept, there are no ids, and "left_out" gives the reason.

A prompt's "turns" are the user turns after its first one.
"""

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from orthrus.base.json_text import parse_json
from orthrus.base.outputs import write_text_atomic
from orthrus.base.prompt_files import is_domain
from orthrus.errors import CorruptFileError, StorageError, UserInputError

PROMPTS = "prompts.jsonl"
# More than any vocabulary has. The ids are checked against a base when it is loaded.
MOST_IDS = 2**28


@dataclass(frozen=True, slots=True)
class Sample:
    """One dialogue: the prompt's ids, through the chat template, and the base's own answer.

    With several turns, answer_ids holds everything after the first prompt. spans: the parts (start, end) of answer_ids
    that the base wrote; all others are the user's. Without spans, answer_ids is one answer.
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
    """Only the lower-case words and numbers. Texts with equal results count as the same."""
    return " ".join(re.findall(r"\w+", text.casefold()))


class Unseen:
    """Accepts each text once, and no text that repeats or contains a held-out one."""

    def __init__(self, held_out: Iterable[str] = ()) -> None:
        self._held_out = {normalised(text) for text in held_out} - {""}
        self._seen: set[str] = set()

    def __call__(self, text: str) -> bool:
        key = normalised(text)
        if not key or key in self._seen or any(key in held or held in key for held in self._held_out):
            return False
        self._seen.add(key)
        return True

    @property
    def digest(self) -> str:
        """Digest of the held-out texts. It depends neither on their order nor on their files."""
        return hashlib.blake2b("\n".join(sorted(self._held_out)).encode(), digest_size=16).hexdigest()

    def holds_out(self, text: str) -> bool:
        """Whether a later turn of a dialogue contains a held-out text. It may be a part of one, such as "Why?"."""
        key = normalised(text)
        return any(held in key for held in self._held_out)


def write_jsonl(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a whole JSONL file in one step."""
    write_text_atomic(file, "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records))


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file, one at a time.

    Raises CorruptFileError, with file and line, and StorageError for a file that cannot be read.
    """
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _record(line, file, number)
    except OSError as e:
        raise StorageError(
            f"{file} cannot be read ({e.strerror or e}); it should be a file of the corpus."
        ) from e


def _record(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError as e:
        raise _damaged(file, number, "is not a JSON object") from e
    if not isinstance(record, dict):
        raise _damaged(file, number, "is not a JSON object")
    return record


def read_source(file: Path) -> list[dict[str, Any]]:
    """The texts of one source, each {"prompt", "domain"} and perhaps "turns". CorruptFileError names file and line."""
    records = list(read_jsonl(file))
    for number, record in enumerate(records, 1):
        if not isinstance(record.get("prompt"), str) or not is_domain(record.get("domain")):
            raise _damaged(file, number, "has no texts 'prompt' and 'domain'")
        _check_turns(record, file, number)
    return records


def _check_turns(record: dict[str, Any], file: Path, number: int) -> None:
    turns = record.get("turns", [])
    if not isinstance(turns, list) or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise _damaged(file, number, "has 'turns' that are not a list of texts")


def read_prompts(folder: Path) -> Iterator[dict[str, Any]]:
    """The prompts of a corpus, each {"prompt_ids", "domain"} and usually "prompt" (their text) and "turns".

    Raises CorruptFileError, with file and line.
    """
    file = folder / PROMPTS
    for number, record in enumerate(read_jsonl(file), 1):
        if not _are_ids(record.get("prompt_ids")) or not record["prompt_ids"]:
            raise _damaged(file, number, "has no list of token ids 'prompt_ids'")
        if not is_domain(record.get("domain")):
            raise _damaged(file, number, "has no text 'domain'")
        if not isinstance(record.get("prompt", ""), str):
            raise _damaged(file, number, "has a 'prompt' that is no text")
        _check_turns(record, file, number)
        yield record


def _are_ids(value: object) -> TypeGuard[list[int]]:
    # A corpus may have a billion ids, so there is no Python loop.
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) < MOST_IDS)


def _damaged(file: Path, line: int, what: str) -> CorruptFileError:
    # Answers name their prompts by number, so they are worthless without this very file.
    remedy = (
        "restore the file, or make a new corpus"
        if file.name == PROMPTS
        else "delete the file and run synth again"
    )
    return CorruptFileError(f"{file}, line {line} {what}; {remedy}.")


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"answers-{index:05d}.jsonl"


def source_path(folder: Path, index: int) -> Path:
    return folder / f"source-{index:02d}.jsonl"


def corpus_files(folder: Path) -> list[Path]:
    """The files of prompts and answers. Raises UserInputError if there is no corpus."""
    if not (folder / PROMPTS).is_file():
        raise UserInputError(
            f"{folder} holds no corpus ({PROMPTS} is missing); make one with `orthrus synth`."
        )
    return [folder / PROMPTS, *sorted(folder.glob("answers-*.jsonl"))]


def read_corpus(folder: Path, on_file: Callable[[Path], None] = lambda _: None) -> Iterator[Sample]:
    """All answered prompts of a corpus folder, in the prompts' order, one at a time.

    on_file: called with each file before it is read. Raises UserInputError if there is no corpus, or at the end if it
    is empty. Raises CorruptFileError for a damaged file.
    """
    first, *answers = corpus_files(folder)
    on_file(first)
    prompts = _Prompts(read_prompts(folder))
    empty = True
    for file in answers:
        on_file(file)
        for sample in _samples(file, prompts):
            if sample.answer_ids:
                empty = False
                yield sample
    if empty:
        raise UserInputError(
            f"the corpus in {folder} is empty: there is no answer yet, or each one repeated itself; "
            "run `orthrus synth` again, with more prompts if need be."
        )


class _Prompts:
    """The ids and domain of each prompt, with four bytes for each token."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self._ids, self._ends, self._domains = array("I"), array("q", [0]), array("l")
        self._names: dict[str, int] = {}
        for record in records:
            self._ids.extend(record["prompt_ids"])
            self._ends.append(len(self._ids))
            self._domains.append(self._names.setdefault(record["domain"], len(self._names)))
        self._list = list(self._names)

    def __len__(self) -> int:
        return len(self._domains)

    def __getitem__(self, which: int) -> tuple[tuple[int, ...], str]:
        ids = self._ids[self._ends[which] : self._ends[which + 1]]
        return tuple(ids), self._list[self._domains[which]]


def left_out(folder: Path) -> dict[str, int]:
    """The number of servers' answers that were left out, by reason."""
    reasons = (r.get("left_out") for file in sorted(folder.glob("answers-*.jsonl")) for r in read_jsonl(file))
    return dict(Counter(str(reason) for reason in reasons if reason))


def _samples(file: Path, prompts: _Prompts) -> Iterator[Sample]:
    for number, record in enumerate(read_jsonl(file), 1):
        which, answer_ids = record.get("prompt"), record.get("answer_ids")
        if type(which) is not int or not 0 <= which < len(prompts):
            raise _damaged(file, number, f"answers no prompt of {PROMPTS} beside it")
        if not _are_ids(answer_ids):
            raise _damaged(file, number, "has no list of token ids 'answer_ids'")
        spans = record.get("spans", [])
        if not _are_spans(spans, len(answer_ids)):
            raise _damaged(file, number, "has 'spans' that are not parts of its 'answer_ids', in order")
        prompt_ids, domain = prompts[which]
        yield Sample(prompt_ids, tuple(answer_ids), domain, tuple((start, end) for start, end in spans))


def _are_spans(value: object, length: int) -> bool:
    """Whether these are sorted pairs (start, end) of parts that are not empty and do not overlap."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return False
    edges = [edge for pair in value for edge in pair]
    if not all(type(edge) is int for edge in edges):
        return False
    in_order = all(start < end for start, end in value) and edges == sorted(edges)
    return in_order and (not edges or (edges[0] >= 0 and edges[-1] <= length))
