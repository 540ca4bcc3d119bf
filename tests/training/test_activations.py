"""Layers that run again in the backward pass give the gradients of layers that kept everything."""

from typing import Any

import pytest
import torch
from tests.packed import pack
from tests.tiny import FAMILY_CONFIGS, VARIANTS, tiny_dual, tiny_prompt, variant_of

from orthrus.base.families import decoder_layers
from orthrus.training.blocks import BlockLayout, draw_blocks
from orthrus.training.corpus import Sample
from orthrus.training.forward import Objective, TrainingPass
from orthrus.training.recipe import ActivationKind

SAMPLES = [
    Sample(tuple(tiny_prompt(7, seed)), tuple(tiny_prompt(length, seed + 50)), "test")
    for seed, length in enumerate((14, 11, 19, 9))
]


def gradients(
    activations: ActivationKind, name: str, dtype: torch.dtype, layout: BlockLayout, **variant: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    dual = tiny_dual(name, block_size=layout.block_size, disturb=0.3, **variant)
    dual.base.to(dtype)  # type: ignore[arg-type]
    for parameter in dual.view_parameters().values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    training = TrainingPass(dual, Objective(), activations=activations)
    batch = draw_blocks(pack(SAMPLES, 48)[:2], [0, 1], 6, layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = training(batch).loss
    # The backward pass begins when nothing of the forward pass holds any more.
    assert all("forward" not in vars(layer) for layer in decoder_layers(dual.base))
    loss.backward()
    return loss.detach(), {path: p.grad for path, p in dual.view_parameters().items()}


def assert_equal(*case: Any, **variant: Any) -> None:
    loss, expected = gradients("none", *case, **variant)
    again, found = gradients("layer", *case, **variant)
    assert torch.equal(again, loss)
    assert any(gradient is not None and gradient.any() for gradient in expected.values())
    for path, gradient in expected.items():
        if gradient is None:
            assert found[path] is None
        else:
            assert torch.equal(found[path], gradient), path  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS))
def test_gradients_of_every_family(name: str, dtype: torch.dtype) -> None:
    assert_equal(name, dtype, BlockLayout(block_size=5))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "all"])
def test_gradients_of_every_kind_of_view(variant: str) -> None:
    assert_equal("qwen3", torch.float32, BlockLayout(block_size=5), **variant_of("qwen3", variant))


def test_gradients_with_moving_blocks_a_repair_head_and_a_trained_mask() -> None:
    layout = BlockLayout(block_size=5, rejected_share=0.5, reveal=0.2)
    assert_equal("llama", torch.float32, layout, repair_rank=4, mask_token_id=None)
