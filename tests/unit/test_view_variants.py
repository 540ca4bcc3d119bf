"""Views of other kinds than full twins everywhere: what they hold, how they start, how they are stored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.engines import decode
from tests.folders import save_base
from tests.tiny import FAMILY_CONFIGS, VARIANTS, VOCAB, disturb_view, tiny_dual, tiny_model, variant_of
from torch import Tensor, nn

import orthrus
from orthrus.base.families import attention_modules, find_family
from orthrus.base.loading import load_base
from orthrus.base.resolve import resolve
from orthrus.config import DecodeConfig
from orthrus.errors import CheckpointError, UserInputError
from orthrus.model.checkpoint import load_view, save_view, stored_tensors, untrained_view
from orthrus.model.dual_view import DualView
from orthrus.model.loading import load_dual
from orthrus.model.merged import save_merged
from orthrus.model.twin import LowRank, LowRankTwin, RowSplit, stock, twins
from orthrus.model.view_config import ViewConfig

EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
IDS_1T = torch.tensor([[5, 9, 17, 4, 33, 8]])


@pytest.mark.parametrize("num_ar", [None, 0, 2, 5])
def test_the_low_rank_part_is_added_to_diffusion_rows_alone(num_ar: int | None) -> None:
    torch.manual_seed(0)
    calls: list[int] = []
    ar = nn.Linear(4, 3)
    ar.register_forward_hook(lambda _m, args, _out: calls.append(args[0].shape[1]))
    split = RowSplit()
    twin = LowRankTwin(ar, nn.Linear(4, 3), split)
    x_BTC = torch.randn(2, 5, 4)
    cut = 5 if num_ar is None else min(num_ar, 5)
    expected_BTC = torch.stack(
        [ar(x_BTC[:, [t]])[:, 0] + (t >= cut) * twin.diffusion(x_BTC[:, t]) for t in range(5)], dim=1
    )
    calls.clear()
    split.num_ar_rows = num_ar
    torch.testing.assert_close(twin(x_BTC), expected_BTC)
    assert calls == [5], "one call for all rows"


def test_the_low_rank_part_is_multiplied_by_its_scale() -> None:
    parts = [
        LowRank(nn.Linear(8, 6), 3, torch.Generator().manual_seed(0), torch.float32, scale)
        for scale in (1.0, 16.0)
    ]
    for part in parts:
        nn.init.ones_(part.up.weight)
    x_RC = torch.randn(5, 8)
    torch.testing.assert_close(parts[1](x_RC), 16.0 * parts[0](x_RC))


@EVERY_VARIANT
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "phi3", "olmo2"])
def test_a_untrained_view_of_every_kind_equals_the_base(name: str, variant: str) -> None:
    dual = tiny_dual(name, **variant_of(name, variant))
    expected_1TV = stock(dual.base)(IDS_1T).logits
    assert torch.equal(dual.base(IDS_1T).logits, expected_1TV)
    with dual.split.at(0):
        torch.testing.assert_close(dual.base(IDS_1T).logits, expected_1TV, atol=1e-5, rtol=1e-5)
    disturb_view(dual, 0.3)
    with dual.split.at(0):
        assert not torch.allclose(dual.base(IDS_1T).logits, expected_1TV, atol=1e-2)
    assert torch.equal(dual.base(IDS_1T).logits, expected_1TV)


@EVERY_VARIANT
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_only_what_the_variant_names_is_trained(name: str, variant: str) -> None:
    settings = variant_of(name, variant)
    dual = tiny_dual(name, **settings)
    family = find_family(FAMILY_CONFIGS[name])
    found = twins(dual.base)
    assert {path.rpartition(".")[2] for path in found} == set(settings.get("twins") or family.twin_names)
    assert {int(path.split(".")[2]) for path in found} == set(settings.get("layers", (0, 1)))
    view = dual.view_parameters()
    ours = {id(p) for p in view.values()}
    assert len(ours) == len(view)
    assert {id(p) for p in dual.parameters() if p.requires_grad} == ours
    assert ours.isdisjoint(id(p) for twin in found.values() for p in twin.ar.parameters())
    if (rank := settings.get("rank")) is not None:
        for path, twin in found.items():
            if family.is_norm(path.rpartition(".")[2]):
                assert torch.equal(twin.diffusion.weight, twin.ar.weight)
            else:
                shapes = {n: tuple(p.shape) for n, p in twin.diffusion.named_parameters()}
                outputs, inputs = twin.ar.weight.shape
                assert shapes == {"down.weight": (rank, inputs), "up.weight": (outputs, rank)}


def test_the_random_side_is_a_function_of_the_seed(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")

    def downs(seed: int) -> dict[str, Tensor]:
        dual = untrained_view(load_base(resolve(str(folder)), device="cpu"), rank=4, seed=seed)
        return {n: p for n, p in dual.view_parameters().items() if n.endswith("down.weight")}

    first, again, other = downs(3), downs(3), downs(4)
    assert len(first) == 8
    for name, down in first.items():
        assert torch.equal(down, again[name])
        assert not torch.equal(down, other[name])
        assert 0.5 < down.std() * down.shape[1] ** 0.5 < 1.5
    assert len({tuple(down.flatten().tolist()) for down in first.values()}) == 8


@pytest.mark.parametrize(
    ("mask", "expected"), [("auto", VOCAB - 1), ("trained", None), (7, 7)], ids=["auto", "trained", "fixed"]
)
def test_masks(mask: Any, expected: int | None, tmp_path: Path) -> None:
    base = load_base(resolve(str(save_base(tmp_path / "base"))), device="cpu")
    dual = untrained_view(base, mask=mask)
    assert dual.config.mask_token_id == expected
    assert ("mask_embedding" in dual.view_parameters()) == (expected is None)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mask": VOCAB}, UserInputError, f"one of .* {VOCAB} embeddings, not {VOCAB}"),
        ({"mask": "learnt"}, UserInputError, "auto, trained or the id"),
        ({"twins": ["q_proj", "x_proj"]}, CheckpointError, "Llama has no x_proj .* q_proj, k_proj, v_proj"),
        ({"twins": ["q_norm"]}, CheckpointError, "Llama has no q_norm"),
        ({"twins": []}, CheckpointError, "at least one twin"),
        ({"rank": 0}, CheckpointError, "rank of a view must be a number from 1 to 65536, not 0"),
        ({"rank": 33}, CheckpointError, "rank 33 is more than the 32 inputs"),
        (
            {"rank": 4, "rank_scale": 0.0},
            CheckpointError,
            "rank_scale of a view must be a positive number, not 0.0",
        ),
        ({"layers": [2]}, CheckpointError, "layer 2, but this base has 2"),
    ],
)
def test_what_the_base_does_not_have_is_refused_before_anything_changes(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    base = load_base(resolve(str(save_base(tmp_path / "base"))), device="cpu")
    with pytest.raises(error, match=message) as caught:
        untrained_view(base, **settings)
    assert "\n" not in str(caught.value)
    assert not twins(base.model)


class Int8Linear(nn.Module):
    """A linear whose weight cannot be had, as quantised bases have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().max() / 127
        self.register_buffer("codes", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.float() * self.scale)


def test_low_rank_twins_stand_on_a_quantised_base(tmp_path: Path) -> None:
    def made() -> DualView:
        model = tiny_model("llama")
        for attention in attention_modules(model):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(attention, name, Int8Linear(getattr(attention, name)))
        return DualView(model, find_family(model), ViewConfig(block_size=6, mask_token_id=60, rank=4))

    dual = made()
    disturb_view(dual, 0.2)
    assert all(p.dtype == torch.float32 for p in dual.view_parameters().values())
    ids = IDS_1T[0].tolist()
    result = decode(dual, ids, DecodeConfig(max_new_tokens=24, strategy="fused_tree"))
    model = dual.stock()
    assert not twins(model)
    expected_1T = model.generate(IDS_1T, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert list(result.token_ids) == expected_1T[0, len(ids) :].tolist()
    assert result.stats.num_accepted > 0
    save_view(dual, tmp_path / "view", "delta4")
    # No AR tensor to be the difference from: what is stored is what there is.
    tensors = load_file(tmp_path / "view" / "view.safetensors")
    assert tensors.keys() == stored_tensors(dual, "full").keys()


@EVERY_VARIANT
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "phi3"])
def test_every_kind_comes_back_from_every_folder(name: str, variant: str, tmp_path: Path) -> None:
    base_folder = save_base(tmp_path / "base", name)
    settings = variant_of(name, variant)
    mask = "trained" if settings.pop("mask_token_id", 0) is None else "auto"
    base = load_base(resolve(str(base_folder)), device="cpu")
    dual = untrained_view(base, 6, **settings, mask=mask)
    disturb_view(dual, 0.2)
    save_view(dual, tmp_path / "full")
    save_view(dual, tmp_path / "packed", "delta4")
    save_merged(dual, base, tmp_path / "merged")

    expected = dual.view_parameters()
    for folder in ("full", "merged"):
        model = orthrus.OrthrusForCausalLM.from_pretrained(tmp_path / folder)
        assert model.dual.config == dual.config
        found = model.dual.view_parameters()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    _, unpacked = load_dual(str(base_folder), str(tmp_path / "packed"), device="cpu")
    for n, parameter in unpacked.view_parameters().items():
        if "down" in n or "up" in n or parameter.ndim == 1:
            assert torch.equal(parameter, expected[n]), n
        else:
            assert (parameter - expected[n]).abs().max() <= 0.1 * expected[n].abs().max(), n
    save_view(unpacked, tmp_path / "again", "delta4")
    files = [tmp_path / folder / "view.safetensors" for folder in ("packed", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": None}, "lacks 8 tensors, model.layers.0.self_attn.k_proj_diff.weight first"),
        ({"rank": 5}, r"has shape \(4, 32\), the base needs \(5, 32\)"),
        ({"rank": "4"}, "rank of a view must be a number from 1 to 65536, not '4'"),
        ({"rank_scale": "8"}, "rank_scale of a view must be a positive number, not '8'"),
        ({"twins": ["q_proj"]}, "has 12 tensors too many"),
        ({"twins": ["w_proj"]}, "Llama has no w_proj"),
        ({"twins": 3}, "twins of a view must be a list of names of modules, not 3"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base_folder = save_base(tmp_path / "base")
    save_view(untrained_view(load_base(resolve(str(base_folder)), device="cpu"), rank=4), tmp_path / "view")
    file = tmp_path / "view" / "view_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    base = load_base(resolve(str(base_folder)), device="cpu")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_view(base, tmp_path / "view")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"twins": ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")}, "wants twins of q_proj, .*, k_norm"),
        ({"rank": 4}, "no place for low-rank twins"),
    ],
)
def test_the_released_layout_holds_full_views_only(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    dual = tiny_dual("qwen3", **settings)
    with pytest.raises(CheckpointError, match=f"cannot hold this view: .*{reason}; write a merged folder"):
        save_merged(dual, None, tmp_path / "out", "released")
    assert not list(tmp_path.iterdir())
