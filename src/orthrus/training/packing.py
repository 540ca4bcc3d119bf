"""Packs dialogues into sequences of a fixed length. Documents of a sequence do not see each other.

A sequence is coded with four bytes for each token: its id, and flags for padding, an answer's tokens, and the begin of
a dialogue or an answer.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthrus.training.corpus import MOST_IDS, Sample

Words = NDArray[np.uint32]

# Token ids are below MOST_IDS = 2**28. The flags are the bits above.
_BEGINS = 1 << 31
_ANSWER_BEGINS = 1 << 30
_ANSWERED = 1 << 29
_PADDING = 1 << 28
_OPEN_SEQUENCES = 16


@dataclass(frozen=True, slots=True, eq=False)
class PackedSequence:
    """One sequence; all tensors are int64 of length T.

    document_T: the number of each token's dialogue, -1 for padding. answer_T: the number of each token's answer in the
    sequence, -1 for tokens that the base did not write.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    document_T: Tensor
    answer_T: Tensor


def dialogue_words(sample: Sample) -> Words:
    """A coded dialogue: a word for each token of prompt and answer."""
    words = np.array((*sample.prompt_ids, *sample.answer_ids), dtype=np.uint32)
    words[0] |= _BEGINS
    first = len(sample.prompt_ids)
    for start, end in sample.answer_spans:
        words[first + start : first + end] |= _ANSWERED
        words[first + start] |= _ANSWER_BEGINS
    return words


def empty_words(sequence_length: int) -> Words:
    """A sequence of padding."""
    return np.full(sequence_length, _PADDING, dtype=np.uint32)


def sequence_of(words_T: NDArray[Any]) -> PackedSequence:
    """The decoded sequence of T words."""
    word_T = torch.from_numpy(words_T.astype(np.int64))
    used_T, begins_T, answered_T = (
        word_T != _PADDING,
        (word_T & _BEGINS) != 0,
        (word_T & _ANSWERED) != 0,
    )
    index_T = torch.arange(len(word_T))
    start_T = index_T.where(begins_T, 0).cummax(0).values
    return PackedSequence(
        token_ids_T=(word_T & (MOST_IDS - 1)).where(used_T, 0),
        position_ids_T=(index_T - start_T).where(used_T, 0),
        document_T=(begins_T.cumsum(0) - 1).where(used_T, -1),
        answer_T=(((word_T & _ANSWER_BEGINS) != 0).cumsum(0) - 1).where(answered_T, -1),
    )


class Place(NamedTuple):
    """The place of a dialogue: the number of its sequence, and its first index there. closed: a full sequence."""

    sequence: int
    at: int
    closed: int | None


class Places:
    """First-fit packing in the given order, so that the same dialogues always give the same sequences.

    Sequences are numbered in the order in which they are begun.
    """

    def __init__(self, sequence_length: int) -> None:
        self._sequence_length = sequence_length
        self._open: list[tuple[int, int]] = []
        self.num_sequences = 0

    def place(self, length: int) -> Place:
        """The place of a dialogue of 1 to `sequence_length` tokens."""
        for i, (room, sequence) in enumerate(self._open):
            if length <= room:
                self._open[i] = (room - length, sequence)
                return Place(sequence, self._sequence_length - room, None)
        sequence, closed = self.num_sequences, None
        self.num_sequences += 1
        self._open.append((self._sequence_length - length, sequence))
        # A short list of open sequences keeps the time linear. The fullest sequence is closed first.
        if len(self._open) > _OPEN_SEQUENCES:
            fullest = min(self._open, key=lambda place: place[0])
            self._open.remove(fullest)
            closed = fullest[1]
        return Place(sequence, 0, closed)
