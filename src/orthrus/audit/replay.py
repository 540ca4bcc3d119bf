"""Compute the logits of one position again, just as we decoded it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from orthrus.api import Orthrus
from orthrus.config import DecodeConfig
from orthrus.engine.stock import watch_passes
from orthrus.model.passes import Pass
from orthrus.model.slot_cache import SlotCache


class Chunk(NamedTuple):
    """A pass with AR rows: tokens committed before it, its rows of both views, and which were projected."""

    start: int
    num_rows: int
    logit_rows: list[int]


@dataclass(slots=True)
class OurReplay:
    """`logits_V`: the AR view's float32 logits that decided the position, None if no pass computed them.

    `token` is what was committed this time. `chunks` are the passes with AR rows.
    """

    logits_V: Tensor | None = None
    token: int | None = None
    chunks: list[Chunk] = field(default_factory=list)


def replay_ours(
    orthrus: Orthrus, prompt_ids: list[int], config: DecodeConfig, our_ids: Sequence[int], position: int
) -> OurReplay:
    """Decode `our_ids` again up to token number `position` (from 0), and keep what that was decided by."""
    replay = OurReplay()
    text = [*prompt_ids, *our_ids[:position]]

    def on_pass(p: Pass, cache: SlotCache, hidden_BTC: Tensor) -> None:
        if p.num_ar_rows == 0:
            return
        start = cache.lengths[0]
        rows = p.logit_rows_R.tolist()
        replay.chunks.append(Chunk(start, p.num_rows, rows))
        row = _row_that_read(text[start:], p, start)
        if row is not None and row in rows:
            # Projected with the rows that the engine projects it with: alone it might round otherwise.
            logits_RV = orthrus.dual.head(hidden_BTC[0, p.logit_rows_R])
            replay.logits_V = logits_RV[rows.index(row)].float().clone()

    token_ids: list[int] = []
    with watch_passes(orthrus.dual, on_pass):
        for cycle in orthrus.stream_ids(prompt_ids, config):
            token_ids += cycle.token_ids
            if len(token_ids) > position:
                break
    replay.token = token_ids[position] if len(token_ids) > position else None
    return replay


def _row_that_read(tail: list[int], p: Pass, start: int) -> int | None:
    """The AR row whose path in this pass is `tail`, the end of the text: siblings of a tree read another."""
    ids, slots = p.token_ids_BT[0].tolist(), p.slots_BT[0].tolist()
    id_at = dict(zip(slots, ids, strict=True))
    for row in range(p.num_ar_rows):
        read = p.visible_BTS[0, row, start:].nonzero()[:, 0].tolist()
        if [id_at[start + slot] for slot in read] == tail:
            return row
    return None
