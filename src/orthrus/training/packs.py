"""Packed corpora on disk: sequences of coded tokens in memory-mapped shards, and an index.

A packed folder holds `pack.json` (the index) and `sequences-00000.u32`, ... (little-endian words, T for each sequence,
see `packing`). The packed form of a corpus folder is cached in its folder `packed/SEQUENCE_LENGTH`. A packed folder in
another place may be used without its corpus.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np

from orthrus.base.outputs import storage_errors
from orthrus.base.owned import locked_folder, replace_folder, restore_folder
from orthrus.base.storage import Progress
from orthrus.errors import CorruptFileError, StorageError, UserInputError
from orthrus.training.corpus import PROMPTS
from orthrus.training.pack_index import (
    INDEX,
    KIND,
    WORD,
    PackIndex,
    damaged,
    file_digest,
    named,
    read_index,
    shard_name,
)
from orthrus.training.pack_writer import pack_corpus, stamps
from orthrus.training.packing import PackedSequence, sequence_of

CACHE = "packed"


class _Sequences(Sequence[PackedSequence], ABC):
    """Sequences that are read on access, one by one."""

    @overload
    def __getitem__(self, at: int) -> PackedSequence: ...
    @overload
    def __getitem__(self, at: slice) -> list[PackedSequence]: ...
    def __getitem__(self, at: int | slice) -> PackedSequence | list[PackedSequence]:
        places = range(len(self))[at]
        return (
            self._sequence(places) if isinstance(places, int) else [self._sequence(place) for place in places]
        )

    @abstractmethod
    def _sequence(self, at: int) -> PackedSequence:
        """Sequence `at`, from 0."""


class Pack(_Sequences):
    """The sequences of a packed folder, read from its files on access."""

    def __init__(self, folder: Path, index: PackIndex, shards: Sequence[Any]) -> None:
        self.folder, self.about, self._shards = folder, index, shards

    def __len__(self) -> int:
        return self.about.num_sequences

    def _sequence(self, at: int) -> PackedSequence:
        """Raises CorruptFileError for a sequence with a larger token id than the index states."""
        shard, sequence = divmod(at, self.about.shard_sequences)
        found = sequence_of(self._shards[shard][sequence])
        if int(found.token_ids_T.max()) > self.about.largest_id:
            raise damaged(self.folder / shard_name(shard), f"sequence {sequence} has an unknown token id")
        return found


class Packs(_Sequences):
    """The sequences of several packed folders, one after the other. parts: the packs by the names of their folders."""

    def __init__(self, parts: dict[str, Pack]) -> None:
        self.parts = parts
        self._packs = list(parts.values())
        self._ends = list(accumulate(map(len, self._packs)))

    def __len__(self) -> int:
        return self._ends[-1]

    def _sequence(self, at: int) -> PackedSequence:
        which = bisect_right(self._ends, at)
        return self._packs[which][at - self._ends[which]]

    @property
    def dialogues(self) -> int:
        return sum(pack.about.dialogues for pack in self._packs)

    @property
    def digest(self) -> str:
        """A short name for exactly these dialogues, by which a resumed run notices changed data."""
        digests = [pack.about.digest for pack in self._packs]
        return (
            digests[0]
            if len(digests) == 1
            else named(hashlib.blake2b("\n".join(digests).encode(), digest_size=16))
        )


def has_corpus(folder: str) -> bool:
    """Whether the folder holds a corpus or a packed one."""
    path = Path(os.path.expanduser(folder))
    return (path / PROMPTS).is_file() or (path / INDEX).is_file()


def packed_corpora(
    folders: Sequence[str],
    sequence_length: int,
    *,
    drop_long: bool = False,
    on_progress: Progress | None = None,
) -> Packs:
    """The packed sequences of corpus folders, which are packed now if needed. Several must be of one base.

    Raises UserInputError if they are answers of different bases, or one does not record its base, or if dialogues are
    longer than a sequence and `drop_long` is False. Raises as `packed`, too.
    """
    packs = {
        folder: packed(Path(os.path.expanduser(folder)), sequence_length, on_progress) for folder in folders
    }
    for folder, pack in packs.items():
        index = pack.about
        if index.num_long and not drop_long:
            raise UserInputError(
                f"{index.num_long} of {index.num_long + index.dialogues} dialogues in {folder} are longer than a "
                f"sequence of {index.sequence_length} tokens (the longest has {index.longest}); raise "
                "sequence_length, or set drop_long to leave them out."
            )
        if len(folders) > 1 and index.base is None:
            raise UserInputError(
                f"the corpus in {folder} does not say which base answered, so it cannot be mixed with "
                "others; make it again with `orthrus synth`."
            )
        if index.base != packs[folders[0]].about.base:
            raise UserInputError(
                f"the corpora in {folders[0]} and {folder} are answers of different bases "
                f"({packs[folders[0]].about.base} and {index.base}); train on corpora of one base."
            )
    return Packs(packs)


def packed(folder: Path, sequence_length: int, on_progress: Progress | None = None) -> Pack:
    """The sequences of a packed folder, or of a corpus folder, from its cache or packed now.

    If several processes call this at the same time, one packs and the others wait. Raises UserInputError if there is no
    corpus, if it is empty, if every dialogue is longer than a sequence, or if a packed folder has sequences of another
    length. Raises CorruptFileError for a damaged file, and StorageError if the cache cannot be written.
    """
    if (folder / INDEX).is_file():
        pack = open_pack(folder)
        if pack.about.sequence_length != sequence_length:
            raise UserInputError(
                f"the sequences in {folder} have {pack.about.sequence_length} tokens, the recipe wants "
                f"{sequence_length}; set sequence_length: {pack.about.sequence_length}, or pack the corpus again."
            )
        return pack
    files = stamps(folder)
    place = folder / CACHE / str(sequence_length)
    if (found := _fresh(place, files)) is not None:
        return found
    try:
        with storage_errors(place):
            place.parent.mkdir(exist_ok=True)
    except StorageError as error:
        raise StorageError(
            f"{str(error).removesuffix('.')}: `orthrus pack {folder} --output FOLDER`, and name that as the corpus."
        ) from error
    with locked_folder(place.parent, "packs", wait=True):
        if (found := _fresh(place, files)) is None:
            restore_folder(place, KIND)
            with replace_folder(place, KIND) as scratch:
                pack_corpus(folder, scratch, sequence_length, on_progress)
            found = open_pack(place)
    return found


def open_pack(folder: Path) -> Pack:
    """Open a packed folder. Raises CorruptFileError if its index or the size of a file has changed."""
    index = read_index(folder)
    shards = []
    for shard in range(len(index.shard_digests)):
        sequences = min(index.shard_sequences, index.num_sequences - shard * index.shard_sequences)
        file = folder / shard_name(shard)
        try:
            if file.stat().st_size != sequences * index.sequence_length * WORD.itemsize:
                raise damaged(file, "its size is not that of its sequences")
            shards.append(np.memmap(file, WORD, "r", shape=(sequences, index.sequence_length)))
        except OSError as error:
            raise damaged(file, error.strerror or str(error)) from error
    return Pack(folder, index, shards)


def check_files(pack: Pack) -> None:
    """Read every file of a packed folder. Raises CorruptFileError if the content of one has changed."""
    for shard, digest in enumerate(pack.about.shard_digests):
        file = pack.folder / shard_name(shard)
        if file_digest(file) != digest:
            raise damaged(file, "its content is not what was written")


def _fresh(place: Path, files: dict[str, list[int]]) -> Pack | None:
    """The pack in a cache; None if there is none, or if the corpus has changed since."""
    if not (place / INDEX).is_file():
        return None
    try:
        pack = open_pack(place)
    except CorruptFileError:
        return None
    return pack if pack.about.files == files else None
