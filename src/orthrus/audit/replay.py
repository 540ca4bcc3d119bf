"""Compute the logits of one position again: as we decoded it, and with the stock model in several shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from orthrus.api import Orthrus
from orthrus.config import DecodeConfig
from orthrus.engine.probe import watch_passes
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass, verify_chain
from orthrus.model.slot_cache import SlotCache

ONE_ROW, AS_DECODED, AT_ONCE = "one row", "as decoded", "all at once"


@dataclass(slots=True)
class OurReplay:
    """`logits_V`: the AR view's float32 logits that decided the position, None if no pass computed them.

    `token` is what was committed this time. `chunks` are the passes with AR rows: (tokens already committed,
    rows).
    """

    logits_V: Tensor | None = None
    token: int | None = None
    chunks: list[tuple[int, int]] = field(default_factory=list)


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
        replay.chunks.append((start, p.num_rows))
        row = _row_that_read(text[start:], p, start)
        if row is not None and row in (rows := p.logit_rows_R.tolist()):
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


def stock_logits(
    orthrus: Orthrus,
    prompt_ids: list[int],
    new_ids: list[int],
    chunks: list[tuple[int, int]],
    block_size: int,
) -> dict[str, Tensor]:
    """float32 logits_V of the token after `prompt_ids + new_ids`, by the stock model alone, by shape.

    "one row" is how `generate` works: the prompt at once, then row by row. "as decoded" feeds as many rows
    at a time as our passes had, the text first and something causal behind it, with a mask as ours have one:
    attention picks another kernel for it. The other shapes show what rounding does when these two agree.
    """
    ids = prompt_ids + new_ids
    num_prompt = len(prompt_ids)
    # A cycle may go on behind the token in question.
    chunks = [(start, size) for start, size in chunks if start < len(ids)]
    shapes = {
        ONE_ROW: _cuts(ids, num_prompt, 1),
        AS_DECODED: ((start, _filled(ids[start : start + size], size)) for start, size in chunks),
        f"blocks of {block_size}": _cuts(ids, num_prompt, block_size),
        AT_ONCE: iter([(0, ids)]),
    }
    masks = _CausalMasks(orthrus.dual, max(start + size for start, size in chunks))
    with orthrus.stock() as model:
        return {
            name: _last_logits(model, len(ids), chunk, masks if name == AS_DECODED else None)
            for name, chunk in shapes.items()
        }


class _CausalMasks:
    """The mask of causal rows in the form that our passes hand it over, windows included."""

    def __init__(self, dual: DualView, num_slots: int) -> None:
        self._dual = dual
        self._cache = dual.new_cache(num_slots)
        self._cache.positions_BS[:] = torch.arange(num_slots, device=dual.device)

    def __call__(self, ids_1T: Tensor, start: int) -> Tensor | dict[str, Tensor]:
        return self._dual.masks(verify_chain(ids_1T, [start]), self._cache)


def _filled(ids: list[int], size: int) -> list[int]:
    return ids + ids[-1:] * (size - len(ids))


def _cuts(ids: list[int], num_prompt: int, size: int) -> Iterator[tuple[int, list[int]]]:
    yield 0, ids[:num_prompt]
    for start in range(num_prompt, len(ids), size):
        yield start, ids[start : start + size]


@torch.inference_mode()
def _last_logits(
    model: PreTrainedModel,
    num_ids: int,
    chunks: Iterator[tuple[int, list[int]]],
    masks: "_CausalMasks | None",
) -> Tensor:
    """Feed chunks to a stock cache; rows behind the last of `num_ids` are causal, hence harmless."""
    # Without a config all layers keep the whole history, so that rejected rows can be cropped off again.
    cache = DynamicCache()
    found: Tensor | None = None
    for start, rows in chunks:
        if (num_rejected := cache.get_seq_length() - start) > 0:
            cache.crop(-num_rejected)
        ids_1T = torch.tensor([rows], device=model.device)
        row = num_ids - 1 - start
        keep = [row] if 0 <= row < len(rows) else [0]
        logits_BRV: Tensor = model(
            input_ids=ids_1T,
            attention_mask=None if masks is None else masks(ids_1T, start),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(keep, device=model.device),
        ).logits
        if keep == [row]:
            found = logits_BRV[0, 0].float()
    assert found is not None, "the chunks reach the last id"
    return found
