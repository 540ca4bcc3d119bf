"""Twins split rows where they are told to, start as copies, and never touch the frozen side."""

import pytest
import torch
from tests.tiny import FAMILY_CONFIGS, VOCAB, tiny_dual, tiny_model
from torch import nn

from orthrus.base.families import find_family
from orthrus.errors import CheckpointError, UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.twin import RowSplit, Twin, inject, stock, twins
from orthrus.model.view_config import ViewConfig


@pytest.mark.parametrize("num_ar", [None, 0, 2, 5])
def test_rows_go_to_their_own_side(num_ar: int | None) -> None:
    torch.manual_seed(0)
    split = RowSplit()
    twin = Twin(nn.Linear(4, 3), nn.Linear(4, 3), split)
    x_BTC = torch.randn(2, 5, 4)
    cut = 5 if num_ar is None else num_ar
    expected_BTC = torch.stack(
        [(twin.ar if t < cut else twin.diffusion)(x_BTC[:, t]) for t in range(5)], dim=1
    )
    split.num_ar_rows = num_ar
    torch.testing.assert_close(twin(x_BTC), expected_BTC)


@pytest.mark.parametrize(("row_dim", "shape"), [(-3, (2, 5, 3, 4)), (-2, (2, 3, 5, 4))])
def test_norms_count_rows_in_the_dimension_they_are_told(row_dim: int, shape: tuple[int, ...]) -> None:
    split = RowSplit()
    twin = Twin(nn.Identity(), nn.Flatten(0, 0), split, row_dim)
    twin.diffusion.register_forward_hook(lambda _m, _i, out: out * 2)
    with split.at(2):
        out = twin(torch.ones(shape))
    per_row = out.movedim(row_dim, 0).flatten(1)
    assert [row.unique().tolist() for row in per_row] == [[1.0], [1.0], [2.0], [2.0], [2.0]]


def test_the_split_is_put_back_also_after_an_error() -> None:
    split = RowSplit()
    with split.at(3):
        with pytest.raises(RuntimeError, match="x"), split.at(1):
            raise RuntimeError("x")
        assert split.num_ar_rows == 3
    assert split.num_ar_rows is None


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_injected_twins_start_as_copies_with_weights_of_their_own(name: str) -> None:
    model = tiny_model(name)
    originals = dict(model.named_modules())
    inject(model, find_family(model))
    found = twins(model)
    assert len(found) == model.config.num_hidden_layers * len(find_family(model).twin_names)
    for path, twin in found.items():
        assert twin.ar is originals[path]
        for a, d in zip(twin.ar.parameters(), twin.diffusion.parameters(), strict=True):
            assert torch.equal(a, d)
            assert a.data_ptr() != d.data_ptr()
            assert not a.requires_grad
            assert d.requires_grad


def test_twins_may_be_put_into_some_layers_only() -> None:
    model = tiny_model("llama")
    inject(model, find_family(model), layers=[1])
    assert {path.split(".")[2] for path in twins(model)} == {"1"}


def test_a_second_view_on_the_same_base_is_refused() -> None:
    """Twins of twins would be no longer the base's own modules, and nothing would tell."""
    model = tiny_model("llama")
    config = ViewConfig(block_size=4, mask_token_id=0)
    DualView(model, find_family(model), config)
    with pytest.raises(UserInputError, match="carries a view already"):
        DualView(model, find_family(model), config)


@pytest.mark.parametrize("layer", [2, -1])
def test_layers_that_the_base_lacks_are_refused_before_anything_changes(layer: int) -> None:
    model = tiny_model("llama")
    with pytest.raises(CheckpointError, match=f"layer {layer}, but this base has 2"):
        DualView(model, find_family(model), ViewConfig(block_size=4, mask_token_id=0, layers=(0, layer)))
    assert not twins(model)


@pytest.mark.parametrize("mask_token_id", [VOCAB, -5])
def test_a_mask_token_that_the_base_lacks_is_refused(mask_token_id: int) -> None:
    model = tiny_model("llama")
    with pytest.raises(CheckpointError, match=f"mask token id {mask_token_id} .* {VOCAB} embeddings"):
        DualView(model, find_family(model), ViewConfig(block_size=4, mask_token_id=mask_token_id))
    assert not twins(model)


def test_callers_who_know_nothing_of_us_get_the_base() -> None:
    dual = tiny_dual("llama", disturb=0.5)
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    expected = stock(dual.base)(ids_BT).logits
    assert torch.equal(dual.base(ids_BT).logits, expected)
    assert twins(dual.base)


def test_a_trained_mask_embedding_starts_at_the_mean_and_stands_for_mask_rows_only() -> None:
    dual = tiny_dual("llama", mask_token_id=None)
    assert dual.mask_embedding is not None
    weight_VC = dual.base.get_input_embeddings().weight
    torch.testing.assert_close(dual.mask_embedding.data, weight_VC.mean(0))
    embeds_BTC = dual.embed(torch.tensor([[7, dual.mask_token_id, 0]]))
    assert torch.equal(embeds_BTC[0, 0], weight_VC[7])
    assert torch.equal(embeds_BTC[0, 1], dual.mask_embedding)
    assert torch.equal(embeds_BTC[0, 2], weight_VC[0])
    assert "mask_embedding" in dual.view_parameters()


def test_gemmas_mask_embedding_is_on_the_scale_of_what_its_first_layer_sees() -> None:
    dual = tiny_dual("gemma3", mask_token_id=None)
    assert dual.mask_embedding is not None
    looked_up_VC = dual.base.get_input_embeddings()(torch.arange(VOCAB))
    torch.testing.assert_close(dual.mask_embedding.data, looked_up_VC.mean(0), atol=1e-6, rtol=1e-5)


def test_only_the_view_can_be_trained() -> None:
    dual = tiny_dual("qwen3", mask_token_id=None)
    ours = {id(p) for p in dual.view_parameters().values()}
    assert {id(p) for p in dual.parameters() if p.requires_grad} == ours
    assert dual.num_view_parameters() == sum(p.numel() for p in dual.parameters() if p.requires_grad)
