"""Packs a corpus: writes its dialogues, one at a time, into files of sequences, and then their index."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from orthrus.base.storage import Progress
from orthrus.errors import UserInputError
from orthrus.training import manifest
from orthrus.training.corpus import MOST_IDS, Sample, corpus_files, read_corpus
from orthrus.training.pack_index import FORMAT, INDEX, KIND, WORD, PackIndex, file_digest, named, shard_name
from orthrus.training.packing import Places, Words, dialogue_words, empty_words

_SHARD_WORDS = 2**26


def pack_corpus(
    folder: Path, target: Path, sequence_length: int, on_progress: Progress | None = None
) -> None:
    """Pack a corpus folder into `target`, an empty folder. Raises as `packed`."""
    files = stamps(folder)
    samples = _with_progress(folder, files, on_progress)
    base, sources = manifest.base_fingerprint(folder), tuple(manifest.corpus_sources(folder))
    write_pack(samples, target, sequence_length, base=base, sources=sources, files=files)


def write_pack(
    samples: Iterable[Sample],
    target: Path,
    sequence_length: int,
    *,
    base: str | None = None,
    sources: tuple[str, ...] = (),
    files: dict[str, list[int]] | None = None,
) -> PackIndex:
    """Pack dialogues into `target`, an empty folder. Dialogues longer than a sequence are counted and left out.

    Raises UserInputError if no dialogue is left.
    """
    shard_sequences = max(1, _SHARD_WORDS // sequence_length)
    places, digest, domains = Places(sequence_length), hashlib.blake2b(digest_size=16), Counter[str]()
    open_sequences: dict[int, Words] = {}
    num_long = longest = largest_id = tokens = answer_tokens = 0
    with _Shards(target, sequence_length, shard_sequences) as shards:
        for sample in samples:
            words = dialogue_words(sample)
            digest.update(words.astype(WORD, copy=False).tobytes())
            longest = max(longest, len(words))
            if len(words) > sequence_length:
                num_long += 1
                continue
            largest_id = max(largest_id, int((words & (MOST_IDS - 1)).max()))
            tokens, answer_tokens = tokens + len(words), answer_tokens + sample.num_answered
            domains[sample.domain] += 1
            sequence, at, closed = places.place(len(words))
            open_sequences.setdefault(sequence, empty_words(sequence_length))[at : at + len(words)] = words
            if closed is not None:
                shards.write(closed, open_sequences.pop(closed))
        for sequence, words in open_sequences.items():
            shards.write(sequence, words)
    if not places.num_sequences:
        raise UserInputError(
            f"every dialogue is longer than a sequence of {sequence_length} tokens; raise sequence_length."
        )
    index = PackIndex(
        sequence_length=sequence_length,
        num_sequences=places.num_sequences,
        shard_sequences=shard_sequences,
        digest=named(digest),
        shard_digests=tuple(map(file_digest, shards.files)),
        dialogues=domains.total(),
        num_long=num_long,
        longest=longest,
        largest_id=largest_id,
        tokens=tokens,
        answer_tokens=answer_tokens,
        domains=dict(domains),
        base=base,
        sources=sources,
        files=files or {},
    )
    content = {"kind": KIND, "format": FORMAT} | asdict(index)
    (target / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return index


def stamps(folder: Path) -> dict[str, list[int]]:
    """Size and modification time of every file on which a packed corpus depends."""
    found = {}
    for file in [*corpus_files(folder), folder / manifest.MANIFEST]:
        if file.exists():
            status = file.stat()
            found[file.name] = [status.st_size, status.st_mtime_ns]
    return found


def _with_progress(
    folder: Path, files: dict[str, list[int]], on_progress: Progress | None
) -> Iterator[Sample]:
    """The dialogues of a corpus. on_progress: called with the bytes of the files read so far."""
    total, done = sum(size for size, _ in files.values()), 0

    def begun(file: Path) -> None:
        nonlocal done
        if on_progress is not None:
            on_progress(f"packing {folder}", done, total)
        done += files.get(file.name, [0])[0]

    yield from read_corpus(folder, begun)


class _Shards:
    """The files of sequences, which may be written in any order."""

    def __init__(self, folder: Path, sequence_length: int, shard_sequences: int) -> None:
        self._folder, self._shard_sequences = folder, shard_sequences
        self._sequence_bytes = sequence_length * WORD.itemsize
        self._open: dict[int, BinaryIO] = {}

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def write(self, sequence: int, words_T: Words) -> None:
        shard, at = divmod(sequence, self._shard_sequences)
        if shard not in self._open:
            self._open[shard] = (self._folder / shard_name(shard)).open("wb")
        self._open[shard].seek(at * self._sequence_bytes)
        self._open[shard].write(words_T.astype(WORD, copy=False).tobytes())

    @property
    def files(self) -> list[Path]:
        return [self._folder / shard_name(shard) for shard in sorted(self._open)]
