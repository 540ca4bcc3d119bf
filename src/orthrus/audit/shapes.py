"""The logits of one position by the baseline alone, in passes of several shapes: what rounding can do."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from orthrus.api import Orthrus
from orthrus.audit.replay import Chunk
from orthrus.config import Baseline, DecodeConfig
from orthrus.model.dual_view import DualView
from orthrus.model.passes import verify_chain

ONE_ROW, AS_DECODED, AT_ONCE = "one row", "as decoded", "all at once"

Feed = Callable[[Tensor, Chunk, int | None], Tensor | None]
"""Called with ids_1T, the chunk that they are, and the row whose logits_V are wanted, if any is."""


@torch.inference_mode()
def baseline_logits(
    orthrus: Orthrus,
    against: Baseline,
    config: DecodeConfig,
    prompt_ids: list[int],
    new_ids: list[int],
    chunks: list[Chunk],
) -> dict[str, Tensor]:
    """float32 logits_V of the token after `prompt_ids + new_ids`, by shape, without any of our drafting.

    "one row" is how the baseline decodes: the prompt (at once in `generate`, by chunks in `ar`), then row by
    row. "as decoded" feeds as many rows at a time as the passes of `chunks` had, the text first and something
    causal behind it. The other shapes show what rounding does when these two agree.
    """
    ids, num_prompt = prompt_ids + new_ids, len(prompt_ids)
    block_size = config.block_size or orthrus.dual.config.block_size
    prompt = [
        Chunk(start, size, [size - 1])
        for start, size in _cuts(0, num_prompt, config.prefill_chunk if against == "plain" else num_prompt)
    ]
    shapes = {
        ONE_ROW: prompt + _blocks(num_prompt, len(ids), 1),
        # A cycle may go on behind the token in question.
        AS_DECODED: [chunk for chunk in chunks if chunk.start < len(ids)],
        f"blocks of {block_size}": prompt + _blocks(num_prompt, len(ids), block_size),
        AT_ONCE: [Chunk(0, len(ids), [len(ids) - 1])],
    }
    if against == "plain":
        return {name: _last_logits(_plain(orthrus.dual, shape), ids, shape) for name, shape in shapes.items()}
    model = orthrus.stock()
    return {
        name: _last_logits(
            _stock(model, _CausalMasks(orthrus.dual, shape) if name == AS_DECODED else None), ids, shape
        )
        for name, shape in shapes.items()
    }


def _last_logits(feed: Feed, ids: list[int], chunks: list[Chunk]) -> Tensor:
    """Feed all chunks; rows behind the last id are causal, hence harmless."""
    found: Tensor | None = None
    for chunk in chunks:
        rows = ids[chunk.start : chunk.start + chunk.num_rows]
        rows += rows[-1:] * (chunk.num_rows - len(rows))
        row = len(ids) - 1 - chunk.start
        logits_V = feed(torch.tensor([rows]), chunk, row if row < chunk.num_rows else None)
        found = found if logits_V is None else logits_V
    assert found is not None, "the chunks reach the last id"
    return found.float().clone()


def _plain(dual: DualView, chunks: list[Chunk]) -> Feed:
    """AR rows through the runner that decodes, on a slot cache of their own, its lengths set from outside:
    no engine, so a fault in how it drafts, commits or moves history shows in none of the shapes."""
    cache = dual.new_cache(_num_slots(chunks))

    def feed(ids_1T: Tensor, chunk: Chunk, row: int | None) -> Tensor | None:
        cache.lengths = [chunk.start]
        hidden_TC = dual.hidden(verify_chain(ids_1T.to(dual.device), [chunk.start]), cache)[0]
        if row is None:
            return None
        # Projected beside the rows that the engine projects in such a pass: alone it might round otherwise.
        rows = chunk.logit_rows if row in chunk.logit_rows else [row]
        return dual.head(hidden_TC[rows])[rows.index(row)]

    return feed


def _stock(model: PreTrainedModel, masks: "_CausalMasks | None") -> Feed:
    """The stock forward with its own cache."""
    # Without a config all layers keep the whole history, so that rejected rows can be cropped off again.
    cache = DynamicCache()

    def feed(ids_1T: Tensor, chunk: Chunk, row: int | None) -> Tensor | None:
        if (num_rejected := cache.get_seq_length() - chunk.start) > 0:
            cache.crop(-num_rejected)
        ids_1T = ids_1T.to(model.device)
        logits_BRV: Tensor = model(
            input_ids=ids_1T,
            attention_mask=None if masks is None else masks(ids_1T, chunk.start),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor([row or 0], device=model.device),
        ).logits
        return None if row is None else logits_BRV[0, 0]

    return feed


class _CausalMasks:
    """The mask of causal rows in the form that our passes hand it over, windows included: with a mask
    attention picks another kernel than without."""

    def __init__(self, dual: DualView, chunks: list[Chunk]) -> None:
        num_slots = _num_slots(chunks)
        self._dual = dual
        self._cache = dual.new_cache(num_slots)
        self._cache.positions_BS[:] = torch.arange(num_slots, device=dual.device)

    def __call__(self, ids_1T: Tensor, start: int) -> Tensor | dict[str, Tensor]:
        return self._dual.masks(verify_chain(ids_1T, [start]), self._cache)


def _num_slots(chunks: list[Chunk]) -> int:
    return max(chunk.start + chunk.num_rows for chunk in chunks)


def _blocks(start: int, end: int, size: int) -> list[Chunk]:
    """New tokens, all of whose rows are projected."""
    return [Chunk(at, length, list(range(length))) for at, length in _cuts(start, end, size)]


def _cuts(start: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(size, end - at)) for at in range(start, end, size)]
