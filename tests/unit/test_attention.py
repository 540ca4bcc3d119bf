"""Attention with folded heads against the stock code: same numbers, no copied keys, no trace afterwards."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.tiny import FAMILY_CONFIGS, VOCAB, tiny_dual, tiny_prompt
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthrus.model import attention, dual_view
from orthrus.model.attention import MOST_FOLDED_ROWS, folded_attention, folded_heads
from orthrus.model.dual_view import DualView
from orthrus.model.passes import fused, prefill


class Layer(nn.Module):
    """What the stock code asks its attention layer for."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


@pytest.mark.parametrize("num_rows", [1, 5, MOST_FOLDED_ROWS, MOST_FOLDED_ROWS + 1])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_folded_heads_give_what_the_stock_code_gives(
    scaling: float | None, batch_size: int, heads: int, kv_heads: int, num_rows: int
) -> None:
    generator, num_slots = torch.Generator().manual_seed(0), 140
    query = torch.randn(batch_size, heads, num_rows, 8, generator=generator)
    store = torch.randn(2, batch_size, kv_heads, num_slots + 9, 8, generator=generator)
    keys, values = store[:, :, :, :num_slots]
    mask = torch.rand(batch_size, 1, num_rows, num_slots, generator=generator) < 0.5
    mask[..., 0] = True
    stock: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    layer = Layer(heads // kv_heads)
    expected, _ = stock(layer, query, keys, values, mask, scaling=scaling)
    known: attention.FoldedMasks = {}
    for _ in range(2):
        out, _ = folded_attention(layer, query, keys, values, mask, scaling=scaling, folded_masks=known)
        assert out.shape == expected.shape
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-5)
    assert len(known) == (num_rows <= MOST_FOLDED_ROWS)


def logits(dual: DualView) -> torch.Tensor:
    """Of a prompt, and of a tree with two blocks behind it."""
    cache = dual.new_cache(64)
    first = dual.run(prefill(torch.tensor([tiny_prompt(20)]), [0]), cache)
    cache.commit(20)
    p = fused(torch.tensor([[5, 6, 7, 8]]), [0, 0, 1], [20], [0, 3], 4, VOCAB - 1)
    return torch.cat([first, dual.run(p, cache)], dim=1)


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
@torch.inference_mode()
def test_every_family_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dual = tiny_dual(name, disturb=0.3)
    folded, config = logits(dual), dual.base.config
    kind = config._attn_implementation

    @contextmanager
    def stock(*_: Any) -> Any:
        yield {}

    monkeypatch.setattr(dual_view, "folded_heads", stock)
    torch.testing.assert_close(folded, logits(dual), atol=1e-5, rtol=1e-5)
    assert kind != attention.NAME


def test_no_pass_repeats_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock model does, for several rows under a mask: the test can fail."""

    def repeat_kv(*_: Any) -> None:
        raise RuntimeError("copied")

    monkeypatch.setattr("transformers.integrations.sdpa_attention.repeat_kv", repeat_kv)
    dual = tiny_dual("llama")
    assert dual.base.config._attn_implementation == "sdpa"
    with torch.inference_mode():
        logits(dual)
        with pytest.raises(RuntimeError, match="copied"):
            dual.base(torch.tensor([tiny_prompt(3)]), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))


def test_the_stock_code_is_back_after_a_pass_even_one_that_failed() -> None:
    dual, seen = tiny_dual("llama"), []

    def fail(*_: Any) -> None:
        seen.append(dual.base.config._attn_implementation)
        raise ValueError("by the way")

    hook = dual.base.get_decoder().register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="by the way"):
        logits(dual)
    hook.remove()
    assert [*seen, dual.base.config._attn_implementation] == [attention.NAME, "sdpa"]


@pytest.mark.parametrize(("kind", "device"), [("eager", "cpu"), ("sdpa", "cuda")])
def test_other_attention_and_other_devices_are_left_alone(kind: str, device: str) -> None:
    config = tiny_dual("llama").base.config
    config._attn_implementation = kind
    with folded_heads(config, torch.device(device)) as more:
        assert (config._attn_implementation, more) == (kind, {})
