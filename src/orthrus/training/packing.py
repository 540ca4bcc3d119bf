"""Dialogues into rows of a fixed length; documents share a row but neither mask nor positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.errors import UserInputError
from orthrus.training.corpus import Sample


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """One row; all int64 of length T. document_T: number of the dialogue, -1 on padding. answer_T: number of
    the answer in the row that a token belongs to, -1 on tokens that the base did not write."""

    token_ids_T: Tensor
    position_ids_T: Tensor
    document_T: Tensor
    answer_T: Tensor


def pack(samples: Sequence[Sample], row_length: int, *, drop_long: bool = False) -> list[PackedRow]:
    """First-fit packing in the given order, so that the same samples always give the same rows.

    Raises UserInputError when a dialogue is longer than a row, unless `drop_long` leaves such ones out.
    """
    lengths = [len(s.prompt_ids) + len(s.answer_ids) for s in samples]
    num_long = sum(n > row_length for n in lengths)
    if num_long and not drop_long:
        raise UserInputError(
            f"{num_long} of {len(samples)} dialogues are longer than a row of {row_length} tokens (the "
            f"longest has {max(lengths)}); raise row_length, or set drop_long to leave them out."
        )
    if num_long == len(samples):
        raise UserInputError(f"every dialogue is longer than a row of {row_length} tokens; raise row_length.")
    open_bins: list[tuple[int, list[Sample]]] = []
    rows: list[list[Sample]] = []
    for sample, length in zip(samples, lengths, strict=True):
        if length > row_length:
            continue
        for i, (room, members) in enumerate(open_bins):
            if length <= room:
                members.append(sample)
                open_bins[i] = (room - length, members)
                break
        else:
            members = [sample]
            rows.append(members)
            # A short list of open rows keeps this linear; the fullest one closes first.
            open_bins.append((row_length - length, members))
            if len(open_bins) > 16:
                open_bins.remove(min(open_bins, key=lambda b: b[0]))
    return [_row(members, row_length) for members in rows]


def _row(samples: Sequence[Sample], row_length: int) -> PackedRow:
    token_ids = torch.zeros(row_length, dtype=torch.long)
    position_ids = torch.zeros(row_length, dtype=torch.long)
    document = torch.full((row_length,), -1)
    answer = torch.full((row_length,), -1)
    at = num_answers = 0
    for index, sample in enumerate(samples):
        ids = [*sample.prompt_ids, *sample.answer_ids]
        span = slice(at, at + len(ids))
        token_ids[span] = torch.tensor(ids)
        position_ids[span] = torch.arange(len(ids))
        document[span] = index
        for start, end in sample.answer_spans:
            first = at + len(sample.prompt_ids)
            answer[first + start : first + end] = num_answers
            num_answers += 1
        at += len(ids)
    return PackedRow(token_ids, position_ids, document, answer)
