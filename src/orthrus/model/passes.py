"""The one primitive: a pass over rows of many requests, and the pure functions that build its parts.

A part holds the rows of one request: first its AR rows, then its diffusion rows, in blocks. `join` puts parts into one
pass: the AR rows of all requests, then the diffusion rows of all. Each row reads the whole committed history of its
request, and those rows of its own request in this pass that the part's tail allows. AR rows never read a slot that a
diffusion row wrote. So the output is lossless, whatever a view contains.

Letters: R rows of a pass, I and D rows of a part (all of them, diffusion rows), N slots, P entries of a plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthrus.model.pool import AR, DIFFUSION, PAGE, Slots, pages_for

MASK_EMBEDDING = -1
"""The token id that means the view's own mask embedding, for views without a mask token id."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The rows of one request. Row i has token_ids[i], and its position is offsets[i] after the history.

    num_ar: the first num_ar rows are AR rows. tail_II: bool, whether row i reads row j of the part; None if all rows
    are AR rows that read all rows up to themselves. block_size: rows of each diffusion block, 0 without blocks. judged:
    AR rows whose logits are wanted.
    """

    token_ids: list[int]
    offsets: list[int]
    num_ar: int
    tail_II: NDArray[np.bool_] | None
    block_size: int
    judged: range

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    def check(self) -> None:
        """Assert that each row reads only allowed rows, and every position up to its own exactly once.

        An AR row reads only AR rows. A block reads all of itself, and no other block. No row reads two branches of a
        tree.
        """
        num_ar, num_rows, tail_II = self.num_ar, self.num_rows, self.tail_II
        assert 0 <= num_ar <= num_rows and len(self.offsets) == num_rows
        if tail_II is None:
            assert num_ar == num_rows and self.offsets == list(range(num_rows)), "only a chain needs no tail"
            return
        offsets_I = np.array(self.offsets)
        assert tail_II.shape == (num_rows, num_rows)
        assert tail_II.diagonal().all(), "a row must read itself"
        assert not tail_II[:num_ar, num_ar:].any(), "an AR row reads a diffusion row"
        if num_ar < num_rows:
            block_D = np.arange(num_rows - num_ar) // self.block_size
            assert (tail_II[num_ar:, num_ar:] == (block_D[:, None] == block_D)).all(), (
                "a block reads another block, or not the whole of itself"
            )
            offsets_I[num_ar:] = offsets_I[num_ar:][(block_D + 1) * self.block_size - 1]
        assert (tail_II.sum(1) == offsets_I + 1).all(), "a row must read each position up to its own once"


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A part in its pass: the indices of its rows in the pass, and its pages in the pool.

    length: tokens of its history. Its AR rows are rows [ar_first, ar_first + num_ar) of the pass, its diffusion rows
    those from draft_first on. places: pool slots (N,) of its history, and then of its own rows.
    """

    part: Part
    length: int
    ar_first: int
    draft_first: int
    pages: tuple[int, ...]

    @property
    def ar_rows(self) -> slice:
        return slice(self.ar_first, self.ar_first + self.part.num_ar)

    @property
    def draft_rows(self) -> slice:
        return slice(self.draft_first, self.draft_first + self.part.num_rows - self.part.num_ar)

    @property
    def places(self) -> NDArray[np.int64]:
        slots_N = np.arange(self.length + self.part.num_rows)
        return np.array(self.pages, dtype=np.int64)[slots_N // PAGE] * PAGE + slots_N % PAGE


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """The rows of all spans: token_ids_R, position_ids_R, and slots_R, the slots of the pool that they write (int64).

    plan_P: int64 on the host, everything that attention needs to know of the spans, in the format that
    `kernels/attention.cpp` reads. It begins with the number of spans and the start of the positions. For each span
    follow ar_first, num_ar, draft_first, num_draft, length, start of its pages, start of its tail (0 for none), words
    of a row of its tail. Then come pages, tails (a bit for each pair of rows), and positions.
    """

    token_ids_R: Tensor
    position_ids_R: Tensor
    slots_R: Tensor
    num_ar_rows: int
    spans: tuple[Span, ...]
    plan_P: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.token_ids_R)


def causal(token_ids: Sequence[int], *, judged: range | None = None) -> Part:
    """AR rows that continue the history: a chunk of the prompt, a plain step, a chain of drafts.

    judged: by default all rows. For a chunk that is not the prompt's last, pass an empty range.
    """
    num_rows = len(token_ids)
    rows = range(num_rows)
    return Part(list(token_ids), list(rows), num_rows, None, 0, rows if judged is None else judged)


def tree(
    token_ids: Sequence[int],
    parents: Sequence[int],
    block_rows: Sequence[int] = (),
    block_size: int = 0,
    mask_token_id: int = MASK_EMBEDDING,
) -> Part:
    """The anchor (row 0) and the nodes of a draft tree as AR rows, then a block for each of `block_rows`.

    parents: for each node, the row of its parent, which comes before it. A node's position is the anchor's plus its
    depth. It reads the history, its own ancestors and itself (the tree attention of arXiv 2305.09781, section 4). The
    anchor of block i is AR row block_rows[i] = j: the block starts with that row's token, and masks follow. It reads
    the history, the rows on j's path before j, and all of itself. This is what a block would read if the path had been
    committed (arXiv 2605.12825, section 3).
    """
    num_ar = len(token_ids)
    assert len(parents) == num_ar - 1, "one parent for each row but the anchor"
    if not block_rows and all(parent == row for row, parent in enumerate(parents)):
        return causal(token_ids)
    num_rows = num_ar + len(block_rows) * block_size
    depths = [0]
    reads = [bytearray(num_rows)]
    reads[0][0] = 1
    for row, parent in enumerate(parents, start=1):
        assert 0 <= parent < row, "parents come first"
        depths.append(depths[parent] + 1)
        reads.append(bytearray(reads[parent]))
        reads[row][row] = 1
    ids, offsets = list(token_ids), depths.copy()
    for block, row in enumerate(block_rows):
        block_reads = bytearray(reads[row])
        block_reads[row] = 0
        first = num_ar + block * block_size
        block_reads[first : first + block_size] = b"\1" * block_size
        reads += [block_reads] * block_size
        offsets += range(depths[row], depths[row] + block_size)
        ids += [token_ids[row]] + [mask_token_id] * (block_size - 1)
    tail_II = np.frombuffer(bytearray().join(reads), dtype=np.bool_).reshape(num_rows, num_rows)
    return Part(ids, offsets, num_ar, tail_II, block_size if block_rows else 0, range(num_ar))


def block(anchor_id: int, block_size: int, mask_token_id: int = MASK_EMBEDDING) -> Part:
    """A diffusion block without an AR row: the paper's draft pass, which decides no token itself.

    Row j predicts position anchor + j + 1. Source: arXiv 2605.12825, section 3.
    """
    ids = [anchor_id] + [mask_token_id] * (block_size - 1)
    tail_II = np.ones((block_size, block_size), dtype=np.bool_)
    return Part(ids, list(range(block_size)), 0, tail_II, block_size, range(0))


def join(parts: Sequence[tuple[Part, Slots]], device: torch.device | str = "cpu") -> Pass:
    """One pass of parts, each with its request's slots, which must have space for the part's rows after the history.

    Checks every part, records the writer of each slot in the pool's ledger, and asserts that no row overwrites history
    or a page with another owner.
    """
    assert parts, "a pass has rows"
    num_ar_rows = sum(part.num_ar for part, _ in parts)
    spans, ar_first, draft_first = [], 0, num_ar_rows
    for part, slots in parts:
        part.check()
        used = pages_for(slots.length + part.num_rows)
        assert used <= len(slots.pages), "slots for the rows of a pass come first"
        own = slots.pages[slots.length // PAGE : used]
        assert all(slots.pool.owners(page) == 1 for page in own), "a row would overwrite shared history"
        spans.append(Span(part, slots.length, ar_first, draft_first, tuple(slots.pages[:used])))
        ar_first += part.num_ar
        draft_first += part.num_rows - part.num_ar
    # Lists, because most spans have few rows, and creating arrays would cost more than these.
    ar_rows, draft_rows = _Rows(), _Rows()
    for span in spans:
        ar_rows.add(span, range(span.part.num_ar))
        draft_rows.add(span, range(span.part.num_ar, span.part.num_rows))
    columns_3R = np.array(
        [
            ar_rows.token_ids + draft_rows.token_ids,
            ar_rows.positions + draft_rows.positions,
            ar_rows.places + draft_rows.places,
        ],
        dtype=np.int64,
    )
    _, positions_R, slots_R = columns_3R
    pool = parts[0][1].pool
    pool.positions_S[slots_R] = positions_R
    pool.writers_S[slots_R[:num_ar_rows]] = AR
    pool.writers_S[slots_R[num_ar_rows:]] = DIFFUSION
    on_device = torch.from_numpy(columns_3R).to(device)
    plan_P = torch.from_numpy(_plan(spans, positions_R))
    token_ids_R, position_ids_R, pool_slots_R = on_device.unbind()
    return Pass(token_ids_R, position_ids_R, pool_slots_R, num_ar_rows, tuple(spans), plan_P)


_HEAD, _SPAN = 2, 8


def _plan(spans: Sequence[Span], positions_R: NDArray[np.int64]) -> NDArray[np.int64]:
    head: list[int] = []
    rest: list[int] = []
    start = _HEAD + _SPAN * len(spans)
    for span in spans:
        part = span.part
        pages_at, tail_at, words = start + len(rest), 0, 0
        rest += span.pages
        if part.tail_II is not None:
            words = -(-part.num_rows // 64)
            tail_at = start + len(rest)
            bits = np.zeros((part.num_rows, words * 8), dtype=np.uint8)
            packed = np.packbits(part.tail_II, axis=1, bitorder="little")
            bits[:, : packed.shape[1]] = packed
            rest += bits.view(np.int64).ravel().tolist()
        head += (span.ar_first, part.num_ar, span.draft_first, part.num_rows - part.num_ar)
        head += (span.length, pages_at, tail_at, words)
    plan = np.array([len(spans), start + len(rest), *head, *rest], dtype=np.int64)
    return np.concatenate([plan, positions_R])


class _Rows:
    """The rows of one view, span by span: tokens, positions, and places in the pool."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.places: list[int] = []

    def add(self, span: Span, rows: range) -> None:
        if not rows:
            return
        part, first, pages = span.part, span.length + rows.start, span.pages
        self.token_ids += part.token_ids[rows.start : rows.stop]
        self.positions += [span.length + offset for offset in part.offsets[rows.start : rows.stop]]
        self.places += [pages[slot // PAGE] * PAGE + slot % PAGE for slot in range(first, first + len(rows))]
