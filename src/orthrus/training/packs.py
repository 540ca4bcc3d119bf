"""Packed corpora on disk: sequences of coded tokens in memory-mapped shards, and an index that says what they are.

Layout of a packed folder: `pack.json` (the index), `sequences-00000.u32`, ... (little-endian words, T a sequence; see
`packing`). A corpus folder keeps its own in `packed/SEQUENCE_LENGTH`; a packed folder elsewhere stands for itself.
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
    """Sequences that are read when they are asked for, one by one."""

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
    """The sequences of a packed folder, read from its files when they are asked for."""

    def __init__(self, folder: Path, index: PackIndex, shards: Sequence[Any]) -> None:
        self.folder, self.about, self._shards = folder, index, shards

    def __len__(self) -> int:
        return self.about.num_sequences

    def _sequence(self, at: int) -> PackedSequence:
        """Raises CorruptFileError for a sequence with a token id that the index does not know of."""
        shard, sequence = divmod(at, self.about.shard_sequences)
        found = sequence_of(self._shards[shard][sequence])
        if int(found.token_ids_T.max()) > self.about.largest_id:
            raise damaged(self.folder / shard_name(shard), f"sequence {sequence} has an unknown token id")
        return found


class Packs(_Sequences):
    """The sequences of several packed folders, one after the other. parts: by the names that they were given under."""

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
        """A short name for exactly these dialogues, so that a resumed run can tell that its data changed."""
        digests = [pack.about.digest for pack in self._packs]
        return (
            digests[0]
            if len(digests) == 1
            else named(hashlib.blake2b("\n".join(digests).encode(), digest_size=16))
        )


def has_corpus(folder: str) -> bool:
    """Whether there is a corpus or a packed one."""
    path = Path(os.path.expanduser(folder))
    return (path / PROMPTS).is_file() or (path / INDEX).is_file()


def packed_corpora(
    folders: Sequence[str],
    sequence_length: int,
    *,
    drop_long: bool = False,
    on_progress: Progress | None = None,
) -> Packs:
    """The packed sequences of corpus folders, packed first where that was not done yet. Several must be of one base.

    Raises UserInputError when they are answers of different bases or one does not say of which, when dialogues are
    longer than a sequence and `drop_long` does not leave them out; and as `packed`.
    """
    packs = {
        folder: packed(Path(os.path.expanduser(folder)), sequence_length, on_progress) for folder in folders
    }
    for folder, pack in packs.items():
        index = pack.about
        if index.num_long and not drop_long:
            raise UserInputError(
                f"{index.num_long} of {index.dialogues} dialogues in {folder} are longer than a sequence of "
                f"{index.sequence_length} tokens (the longest has {index.longest}); raise sequence_length, or set "
                "drop_long to leave them out."
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
    """The sequences of a corpus folder, from its cache where that is fresh, else packed now; or of a packed folder.

    Several processes may ask at once: one packs, the others wait. Raises UserInputError when there is no corpus, it
    is empty, every dialogue is longer than a sequence, or a packed folder has sequences of another length;
    CorruptFileError when a file is damaged; StorageError when the cache cannot be written.
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
    """A packed folder; CorruptFileError when its index or the size of a file is not as it was written."""
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
    """Read every file of a packed folder; CorruptFileError for one whose content is not as it was written."""
    for shard, digest in enumerate(pack.about.shard_digests):
        file = pack.folder / shard_name(shard)
        if file_digest(file) != digest:
            raise damaged(file, "its content is not what was written")


def _fresh(place: Path, files: dict[str, list[int]]) -> Pack | None:
    """The pack in a cache, unless there is none or the corpus changed since."""
    if not (place / INDEX).is_file():
        return None
    try:
        pack = open_pack(place)
    except CorruptFileError:
        return None
    return pack if pack.about.files == files else None
