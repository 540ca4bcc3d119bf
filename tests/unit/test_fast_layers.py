"""Layers laid out for few rows: what the stock ones compute, in fewer products."""

from typing import Any

import pytest
import torch
from tests.rows import Rows
from tests.tiny import FAMILY_CONFIGS, tiny_dual
from torch import Tensor

from orthrus.base.families import decoder_layers
from orthrus.engine.fast_layers import fast_layer
from orthrus.kernels.build import load_kernels
from orthrus.kernels.linear import FewRowsLinear
from orthrus.model.dual_view import DualView
from orthrus.model.passes import tree
from orthrus.model.quantise import quantise, quantise_drafts


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    load_kernels()


def with_fast_layers(dual: DualView) -> DualView:
    layers = dual.base.get_decoder().layers
    for index, layer in enumerate(list(layers)):
        fast = fast_layer(layer)
        for module in fast.modules():
            if hasattr(module, "split"):
                module.split = dual.split
        layers[index] = fast
    return dual


def hidden(dual: DualView) -> Tensor:
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (16,)).tolist()
    rows = Rows(dual)
    rows.feed(ids[:11])
    return rows.hidden(tree(ids[11:], [0, 1, 0, 3], [2], 4, dual.mask_token_id))


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_it_is_the_stock_layer(name: str) -> None:
    expected = hidden(tiny_dual(name, disturb=0.3))
    torch.testing.assert_close(
        hidden(with_fast_layers(tiny_dual(name, disturb=0.3))), expected, atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("part", [quantise, quantise_drafts])
def test_it_is_the_quantised_layer(part: object, precision: str) -> None:
    outs = []
    for fast in (False, True):
        dual = tiny_dual("llama", disturb=0.3)
        part(dual, precision)  # type: ignore[operator]
        outs.append(hidden(with_fast_layers(dual) if fast else dual))
    # quantise_drafts joins float32 weights, and four bits have scales for groups: sums are rounded otherwise.
    tolerance = 0.0 if part is quantise and precision == "int8" else 0.02
    torch.testing.assert_close(*outs, atol=tolerance, rtol=tolerance)


def num_products(name: str, **variant: Any) -> int:
    """Of the first layer."""
    layer = next(iter(decoder_layers(tiny_dual(name, **variant).base)))
    return sum(isinstance(module, FewRowsLinear) for module in fast_layer(layer).modules())


def test_what_reads_the_same_input_is_one_product() -> None:
    # q, k and v of both views; o of both; gate and up; down.
    assert num_products("llama") == 2 + 2 + 1 + 1
    # A layer without twins; one where only q has one, so that it cannot be joined.
    assert num_products("llama", layers=(1,)) == 4
    assert num_products("llama", twins=("q_proj",)) == 2 + 1 + 1 + 1 + 2
    # phi3 comes joined.
    assert num_products("phi3") == 2 + 2 + 1 + 1
