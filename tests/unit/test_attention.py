"""Attention span by span against the stock code: the same numbers, and no trace on the live model."""

from typing import Any

import pytest
import torch
from tests.rows import Rows
from tests.tiny import FAMILY_CONFIGS, VOCAB, tiny_dual, tiny_prompt
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthrus.model.attention import NAME, RunningPass, span_attention
from orthrus.model.passes import causal, join, tree
from orthrus.model.pool import SlotPool, Slots
from orthrus.model.runner import EagerRunner

MASK = VOCAB - 1


class Layer(nn.Module):
    """What the stock code asks its attention layer for."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal, self.layer_idx = groups, True, 0


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_spans_give_what_the_stock_code_gives_under_a_mask(
    scaling: float | None, heads: int, kv_heads: int, window: int | None, softcap: float | None
) -> None:
    """Three requests whose pages lie mixed up, some rows AR and some not."""
    generator, size = torch.Generator().manual_seed(0), 8
    pool = SlotPool(FAMILY_CONFIGS["llama"], 6)
    store = torch.randn(2, 1, kv_heads, pool.num_slots, size, generator=generator)
    slots = [Slots(pool) for _ in range(3)]
    for own in (*slots, *slots[:2]):
        assert own.reserve(len(own.pages) * 64 + 64)
    for own, length in zip(slots, (90, 70, 0), strict=True):
        own.commit(length)
    parts = [causal([1, 2, 3]), tree([1, 2, 3, 4], [0, 0, 1], [0, 3], 4, MASK), tree([9], [], [0], 6, MASK)]
    p = join(list(zip(parts, slots, strict=True)))
    query = torch.randn(1, heads, p.num_rows, size, generator=generator)
    running = RunningPass(p, pool, [window])
    layer = Layer(heads // kv_heads)
    out, weights = span_attention(layer, query, *store, None, scaling, softcap, running)
    assert weights is None
    assert out.shape == (1, p.num_rows, heads, size)
    for span in p.spans:
        part, places = span.part, torch.from_numpy(span.places)
        rows = [*range(p.num_rows)[span.ar_rows], *range(p.num_rows)[span.draft_rows]]
        positions = torch.tensor([*range(span.length), *(span.length + o for o in part.offsets)])
        tail = torch.ones(part.num_rows, part.num_rows).tril().bool()
        tail = tail if part.tail_II is None else torch.from_numpy(part.tail_II)
        visible = torch.cat([torch.ones(part.num_rows, span.length, dtype=torch.bool), tail], 1)
        if window is not None:
            visible &= positions[span.length :, None] - positions < window
        expected = _by_hand(query[:, :, rows], *store[..., places, :], visible, scaling, softcap)
        torch.testing.assert_close(out[:, rows], expected, atol=2e-6, rtol=2e-5)


def _by_hand(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float | None, cap: float | None
) -> Tensor:
    fold = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(fold, 1), values.repeat_interleave(fold, 1)
    if cap is None:
        stock: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = stock(Layer(1), query, keys, values, visible[None, None], scaling=scaling)
        return out  # type: ignore[no-any-return]
    scores = query @ keys.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_every_family_computes_what_its_stock_forward_does(name: str) -> None:
    """Of a prompt, and of a tree whose every row is the end of a text of its own."""
    dual = tiny_dual(name, disturb=0.3)
    rows, prompt = Rows(dual), tiny_prompt(20)
    model = dual.stock()

    def stock(token_ids: list[int]) -> Tensor:
        with torch.inference_mode():
            return model(torch.tensor([token_ids]), use_cache=False).logits[0]  # type: ignore[no-any-return]

    torch.testing.assert_close(rows.feed(prompt), stock(prompt), atol=2e-5, rtol=2e-5)
    logits_IV = rows.logits(tree([5, 6, 7, 8], [0, 0, 1], [0, 3], 4, MASK))
    for row, path in enumerate(([5], [5, 6], [5, 7], [5, 6, 8])):
        torch.testing.assert_close(logits_IV[row], stock(prompt + path)[-1], atol=2e-5, rtol=2e-5)


def test_no_pass_repeats_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock model does, for several rows under a mask: the test can fail."""

    def repeat_kv(*_: Any) -> None:
        raise RuntimeError("copied")

    monkeypatch.setattr("transformers.integrations.sdpa_attention.repeat_kv", repeat_kv)
    dual = tiny_dual("llama")
    assert dual.base.config._attn_implementation == "sdpa"
    with torch.inference_mode():
        Rows(dual).feed(tiny_prompt(9))
        with pytest.raises(RuntimeError, match="copied"):
            dual.base(torch.tensor([tiny_prompt(3)]), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))


def test_the_live_model_is_never_touched_not_even_while_a_pass_runs() -> None:
    dual, seen = tiny_dual("llama"), []
    runner = EagerRunner(dual)
    attentions = [layer.self_attn for layer in dual.base.get_decoder().layers]

    def look(*_: Any) -> None:
        seen.append((dual.base.config._attn_implementation, attentions[0].config._attn_implementation))
        raise ValueError("by the way")

    hook = dual.base.get_decoder().norm.register_forward_pre_hook(look)
    with pytest.raises(ValueError, match="by the way"):
        Rows(runner).feed([5, 6])
    hook.remove()
    assert seen == [("sdpa", "sdpa")]
    assert [layer.self_attn for layer in dual.base.get_decoder().layers] == attentions
    assert dual.split.num_ar_rows is None


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_whatever_attention_the_model_was_loaded_with_passes_attend_by_spans(kind: str) -> None:
    dual = tiny_dual("llama")
    dual.base.set_attn_implementation(kind)
    runner = EagerRunner(dual)
    inner = [m.config._attn_implementation for m in runner._decoder.modules() if hasattr(m, "layer_idx")]
    assert set(inner) == {NAME}
    assert dual.base.config._attn_implementation == kind
