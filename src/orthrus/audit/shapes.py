"""Computes the baseline's logits of one position in passes of several shapes, to show the effect of rounding."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from orthrus.api import Orthrus
from orthrus.audit.replay import Chunk
from orthrus.base.families import sliding_window
from orthrus.config import Baseline, DecodeConfig
from orthrus.model.dual_view import DualView, additive_mask, in_window
from orthrus.model.passes import causal, join
from orthrus.model.pool import Slots, pages_for
from orthrus.model.runner import Runner

ONE_ROW, AS_DECODED, AT_ONCE = "one row", "as decoded", "all at once"

Feed = Callable[[Tensor, Chunk, int | None], Tensor | None]
"""Called with ids_1T, their chunk, and the row whose logits_V are wanted, or None."""


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

    "one row" is the baseline's own decoding: first the prompt (at once in `generate`, by chunks in `ar`), then row by
    row. "as decoded" feeds as many rows at a time as the passes of `chunks` had; causal filler rows follow the text.
    The other shapes show the effect of rounding where these two agree.
    """
    ids, num_prompt = prompt_ids + new_ids, len(prompt_ids)
    engine, dual = orthrus.engine, orthrus.dual
    block_size = config.block_size or dual.config.block_size
    prompt = [
        Chunk(start, size, [size - 1])
        for start, size in _cuts(0, num_prompt, engine.config.chunk if against == "plain" else num_prompt)
    ]
    shapes = {
        ONE_ROW: prompt + _blocks(num_prompt, len(ids), 1),
        # The cycle may have gone on beyond the token in question.
        AS_DECODED: [chunk for chunk in chunks if chunk.start < len(ids)],
        f"blocks of {block_size}": prompt + _blocks(num_prompt, len(ids), block_size),
        AT_ONCE: [Chunk(0, len(ids), [len(ids) - 1])],
    }
    if against == "plain":
        return {
            name: _last_logits(_plain(engine.runner, shape), ids, shape) for name, shape in shapes.items()
        }
    model = orthrus.stock()
    return {
        name: _last_logits(_stock(model, dual if name == AS_DECODED else None), ids, shape)
        for name, shape in shapes.items()
    }


@torch.inference_mode()
def continuation_logits(
    orthrus: Orthrus, against: Baseline, prompt_ids: list[int], longest: int
) -> Callable[[Sequence[int]], Tensor]:
    """A function from new ids, at most `longest` of them, to the baseline's float32 logits_V of the next token.

    It uses the runner that decodes, or the stock model, without any of our drafting. The prompt is fed once. Call the
    function in inference mode.
    """
    num_prompt = len(prompt_ids)
    size = orthrus.engine.config.chunk if against == "plain" else num_prompt
    prompt = [Chunk(start, length, [length - 1]) for start, length in _cuts(0, num_prompt, size)]
    feed = (
        _plain(orthrus.engine.runner, [*prompt, Chunk(num_prompt, longest, [])])
        if against == "plain"
        else _stock(orthrus.stock(), None)
    )
    after_prompt_V = _last_logits(feed, prompt_ids, prompt)

    def logits_after(new_ids: Sequence[int]) -> Tensor:
        if not new_ids:
            return after_prompt_V
        # Row by row, as plain decoding does.
        rows = [Chunk(num_prompt + i, 1, [0]) for i in range(len(new_ids))]
        return _last_logits(feed, [*prompt_ids, *new_ids], rows)

    return logits_after


def _last_logits(feed: Feed, ids: list[int], chunks: list[Chunk]) -> Tensor:
    """Feed all chunks. Rows after the last id are causal, so they do not affect it."""
    found: Tensor | None = None
    for chunk in chunks:
        rows = ids[chunk.start : chunk.start + chunk.num_rows]
        rows += rows[-1:] * (chunk.num_rows - len(rows))
        row = len(ids) - 1 - chunk.start
        logits_V = feed(torch.tensor([rows]), chunk, row if row < chunk.num_rows else None)
        found = found if logits_V is None else logits_V
    assert found is not None, "the chunks reach the last id"
    return found.float().clone()


def _plain(runner: Runner, chunks: list[Chunk]) -> Feed:
    """Feeds AR rows to the runner that decodes, in slots of their own.

    No engine takes part, so a fault in its drafting, committing or moving of history affects none of the shapes.
    """
    num_pages = pages_for(max(chunk.start + chunk.num_rows for chunk in chunks))
    pool = runner.new_pool(num_pages)
    slots = Slots(pool)
    slots.reserve(pool.num_slots)

    def feed(ids_1T: Tensor, chunk: Chunk, row: int | None) -> Tensor | None:
        slots.length = chunk.start
        p = join([(causal(ids_1T[0].tolist()), slots)], runner.dual.device)
        hidden_RC = runner.hidden(p, pool)
        if row is None:
            return None
        # It is projected together with the rows that the engine projects in such a pass. Alone it might round
        # differently.
        rows = chunk.logit_rows if row in chunk.logit_rows else [row]
        return runner.head(hidden_RC[rows])[rows.index(row)]

    return feed


def _stock(model: PreTrainedModel, masked: DualView | None) -> Feed:
    """Feeds the stock forward with its own cache. masked: give it ready masks, in the form of this model's family."""
    # Without a config all layers keep the whole history, so rejected rows can be cropped off.
    cache = DynamicCache()

    def feed(ids_1T: Tensor, chunk: Chunk, row: int | None) -> Tensor | None:
        if (num_rejected := cache.get_seq_length() - chunk.start) > 0:
            cache.crop(-num_rejected)
        ids_1T = ids_1T.to(model.device)
        logits_BRV: Tensor = model(
            input_ids=ids_1T,
            attention_mask=None if masked is None else _causal_mask(masked, chunk),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor([row or 0], device=model.device),
        ).logits
        return None if row is None else logits_BRV[0, 0]

    return feed


def _causal_mask(dual: DualView, chunk: Chunk) -> Tensor | dict[str, Tensor]:
    """The mask of causal rows, windows included. Attention picks another kernel with a mask than without one."""
    end = chunk.start + chunk.num_rows
    key_1S = torch.arange(end, device=dual.device)[None]
    query_1T = key_1S[:, chunk.start :]
    visible_1TS = key_1S[:, None] <= query_1T[:, :, None]
    window = sliding_window(dual.base.config)
    windowed_1TS = visible_1TS if window is None else in_window(visible_1TS, query_1T, key_1S, window)
    full, windowed = (additive_mask(visible[:, None], dual.dtype) for visible in (visible_1TS, windowed_1TS))
    return dual.mask_argument(full, windowed)


def _blocks(start: int, end: int, size: int) -> list[Chunk]:
    """Chunks of new tokens, with all rows projected."""
    return [Chunk(at, length, list(range(length))) for at, length in _cuts(start, end, size)]


def _cuts(start: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(size, end - at)) for at in range(start, end, size)]
