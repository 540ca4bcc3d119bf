"""The index of a packed corpus: the content of its files, and digests to check them."""

import hashlib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from orthrus.base.json_text import parse_json
from orthrus.errors import CorruptFileError
from orthrus.training.corpus import MOST_IDS

INDEX = "pack.json"
KIND = "orthrus-pack"
FORMAT = 3
WORD = np.dtype("<u4")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackIndex:
    """The content of a packed folder. Its counts are of the dialogues in it.

    num_long: number of dialogues longer than a sequence, which were left out. longest: tokens of the longest dialogue,
    those included. digest: of all dialogues, those included, in order. shard_digests: of the files. base: fingerprint
    of the base that answered, None if unknown. sources: of the prompts. files: size and modification time of the corpus
    files.
    """

    sequence_length: int
    num_sequences: int
    shard_sequences: int
    digest: str
    shard_digests: tuple[str, ...]
    dialogues: int
    num_long: int
    longest: int
    largest_id: int
    tokens: int
    answer_tokens: int
    domains: dict[str, int]
    base: str | None
    sources: tuple[str, ...]
    files: dict[str, list[int]]


def read_index(folder: Path) -> PackIndex:
    """The index of a packed folder. Raises CorruptFileError for a file that is no index."""
    file = folder / INDEX
    try:
        content = parse_json(file.read_bytes())
        if content["kind"] != KIND:
            raise ValueError("another kind of file")
        if content["format"] != FORMAT:
            raise CorruptFileError(
                f"another version of Orthrus wrote {file}; delete its folder and pack the corpus again."
            )
        values = {field.name: content[field.name] for field in fields(PackIndex)}
        for name in ("shard_digests", "sources"):
            values[name] = tuple(map(str, values[name]))
        index = PackIndex(**values)
        _check(index)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(file, "it is no index of a packed corpus") from error
    return index


def _check(index: PackIndex) -> None:
    """Raises ValueError for values that `write_pack` cannot have written."""
    counts = (
        index.sequence_length,
        index.num_sequences,
        index.shard_sequences,
        index.dialogues,
        index.longest,
        index.tokens,
    )
    free = (index.num_long, index.largest_id, index.answer_tokens)
    sound = all(type(number) is int and 0 < number < 2**53 for number in counts)
    sound = sound and all(type(number) is int and 0 <= number < 2**53 for number in free)
    sound = sound and all(isinstance(part, dict) for part in (index.domains, index.files))
    sound = sound and isinstance(index.digest, str) and (index.base is None or isinstance(index.base, str))
    if not sound or index.largest_id >= MOST_IDS:
        raise ValueError("wrong values")
    if len(index.shard_digests) != math.ceil(index.num_sequences / index.shard_sequences):
        raise ValueError("wrong number of shards")


def file_digest(file: Path) -> str:
    with file.open("rb") as content:
        return named(hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)))


def shard_name(shard: int) -> str:
    return f"sequences-{shard:05d}.u32"


def named(digest: Any) -> str:
    return f"blake2b:{digest.hexdigest()}"


def damaged(file: Path, what: str) -> CorruptFileError:
    return CorruptFileError(f"{file} is damaged ({what}); delete its folder and pack the corpus again.")
