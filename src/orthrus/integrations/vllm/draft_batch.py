"""Which rows a draft pass has, where they write, and what they read: arithmetic on the host, without vLLM.

A block of D + 1 rows drafts D tokens: its anchor, the last known token, which is not in the cache yet, and
masks. It writes the cache slots from the anchor's on, which the verification that follows writes anew; nothing
reads them in between. With the floor the anchor is an AR row too. Both need the anchor's slot, so a layer lets
the AR rows write and read it first, and the blocks after them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Drafting:
    """One request that drafts: its place in vLLM's batch, the tokens known so far, how many of them precede
    the anchor, and how many tokens to draft."""

    index: int
    anchor_id: int
    num_known: int
    num_drafts: int


@dataclass(frozen=True, slots=True, eq=False)
class DraftBatch:
    """Rows of a draft pass: first one AR row a request, if there is a floor, then all blocks.

    token_ids_R, positions_R, slots_R: of all rows; mask rows carry `mask_id`. is_mask_R: which rows are masks.
    starts_N1: where each request's block starts among the block rows. guess_rows_D: the block rows that guess,
    request by request. num_guesses: of each request.
    """

    requests: tuple[Drafting, ...]
    floor: bool
    token_ids_R: Ints
    positions_R: Ints
    slots_R: Ints
    is_mask_R: NDArray[np.bool_]
    starts_N1: Ints
    guess_rows_D: Ints
    num_guesses: tuple[int, ...]

    @property
    def num_ar_rows(self) -> int:
        return len(self.requests) if self.floor else 0


def most_drafts(num_known: int, wanted: int, block_size: int, max_length: int, room: int) -> int:
    """How many tokens a request may draft.

    num_known: its tokens, the anchor included. block_size: of training, whose last row was asked nothing.
    max_length: positions that the model may use. room: tokens that may still be generated; the verification
    adds one of its own.
    """
    # Rows of the block stand at the anchor's position num_known - 1 and after it.
    return max(0, min(wanted, block_size - 1, max_length - num_known, room - 1))


def draft_batch(
    requests: Sequence[Drafting], block_table_NB: Ints, page: int, *, floor: bool, mask_id: int
) -> DraftBatch:
    """The rows of requests that draft at least one token each.

    block_table_NB: of every request in vLLM's batch, the cache blocks in order; page: slots of a block.
    """
    sizes_N = np.array([r.num_drafts + 1 for r in requests], dtype=np.int64)
    starts_N1 = np.concatenate([[0], np.cumsum(sizes_N)])
    anchors_N = np.array([r.num_known - 1 for r in requests], dtype=np.int64)
    offsets = np.arange(starts_N1[-1]) - np.repeat(starts_N1[:-1], sizes_N)
    positions = np.repeat(anchors_N, sizes_N) + offsets
    ids = np.full(len(positions), mask_id, dtype=np.int64)
    ids[starts_N1[:-1]] = [r.anchor_id for r in requests]
    owners = np.repeat([r.index for r in requests], sizes_N)
    is_mask = offsets > 0
    if floor:
        ids = np.concatenate([ids[starts_N1[:-1]], ids])
        positions = np.concatenate([anchors_N, positions])
        owners = np.concatenate([[r.index for r in requests], owners])
        is_mask = np.concatenate([np.zeros(len(requests), dtype=np.bool_), is_mask])
    slots = block_table_NB[owners, positions // page].astype(np.int64) * page + positions % page
    # The last row of a block was never asked anything; with the floor the first one is not either.
    guesses = [
        np.arange(start + floor, start + r.num_drafts)
        for start, r in zip(starts_N1[:-1], requests, strict=True)
    ]
    return DraftBatch(
        requests=tuple(requests),
        floor=floor,
        token_ids_R=ids,
        positions_R=positions,
        slots_R=slots,
        is_mask_R=is_mask,
        starts_N1=starts_N1,
        guess_rows_D=np.concatenate(guesses),
        num_guesses=tuple(len(rows) for rows in guesses),
    )
