"""What Orthrus asks of a quantisation, shown on one of our own: no library is needed for it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.folders import save_base
from tests.tiny import tiny_model
from torch import Tensor, nn

from orthrus.base import load_base, quantised
from orthrus.base.families import find_family
from orthrus.base.loading import Base
from orthrus.base.quantised import check_gradients, check_runs, is_quantised, plain_linear, quantisation
from orthrus.base.resolve import Source
from orthrus.errors import MissingExtraError, UnsupportedModelError, UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.twin import LowRankTwin, twins
from orthrus.model.view_config import ViewConfig
from orthrus.training.recipe import TrainConfig
from orthrus.training.start import starting_view


class PackedLinear(nn.Module):
    """Rows of int8 numbers with a scale each, kept as buffers: no weight at all."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("scales_O1", linear.weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes_OI", (linear.weight / self.scales_O1).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes_OI.to(x.dtype) * self.scales_O1, self.bias)


class RoundingLinear(PackedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class RefusingLinear(PackedLinear):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("no kernel for this CPU\nand a trace")


def packed_model(kind: type[PackedLinear] = PackedLinear) -> Any:
    model = tiny_model("llama-tied")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, kind(child))
    model.config.quantization_config = {"quant_method": "gptq", "bits": 8}
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unit_vectors_give_the_matrix(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "_BATCH", 5)
    torch.manual_seed(0)
    packed = PackedLinear(nn.Linear(13, 7)).to(dtype)
    assert is_quantised(packed)
    state = torch.get_rng_state()
    plain = plain_linear(packed, dtype)
    assert torch.equal(state, torch.get_rng_state())
    assert not is_quantised(plain)
    expected = packed.codes_OI.to(dtype) * packed.scales_O1
    assert (plain.weight - expected).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(plain.bias, packed.bias)
    assert plain.weight.dtype == plain.bias.dtype == dtype


def test_twins_of_packed_layers() -> None:
    for rank in (None, 3):
        model = packed_model()
        dual = DualView(model, find_family(model), ViewConfig(block_size=4, rank=rank))
        for twin in twins(dual.base).values():
            assert isinstance(twin.ar, PackedLinear)
            assert isinstance(twin, LowRankTwin) == (rank is not None)
            if rank is None:
                assert type(twin.diffusion) is nn.Linear
                assert all(p.requires_grad for p in twin.diffusion.parameters())
        frozen = {name for name, p in dual.named_parameters() if not p.requires_grad}
        assert not frozen & dual.view_parameters().keys()


def test_layers_without_code_for_this_machine_are_found_at_once() -> None:
    check_runs(packed_model(), "gptq 8-bit", "m")
    with pytest.raises(UnsupportedModelError, match=r"m is quantised .*\(no kernel for this CPU\): choose"):
        check_runs(packed_model(RefusingLinear), "gptq 8-bit", "m")


def test_layers_that_drop_the_gradient_are_not_trained_through() -> None:
    for model in (tiny_model(), packed_model()):
        check_gradients(model, "m")
    model = packed_model(RoundingLinear)
    base = Base("m", model, None, frozenset(), 256, find_family(model), Source("folder", "m"))  # type: ignore[arg-type]
    with pytest.raises(UserInputError, match=r"no gradient .* m here \(gptq 8-bit\): train the view on"):
        starting_view(base, TrainConfig(corpus=("x",), output="y"))


@pytest.mark.parametrize(
    ("declared", "name"),
    [
        (None, None),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes 4-bit nf4",
        ),
        ({"quant_method": "gptq", "bits": 4}, "gptq 4-bit"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao int8_weight_only"),
        ({"quant_method": "torchao"}, "torchao"),
    ],
)
def test_what_a_method_is_called(declared: dict[str, Any] | None, name: str | None) -> None:
    assert quantisation(SimpleNamespace(quantization_config=declared)) == name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "advice"),
    [("torchao", r'pip install "orthrus-lm\[quant\]"'), ("bitsandbytes", "pip install bits")],
)
def test_a_missing_package_is_named_with_its_line(
    method: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    declared = {"quant_method": method, "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))
    monkeypatch.setattr(quantised, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=rf"base is quantised \({method}.*needs.*{advice}") as caught:
        load_base(str(folder), device="cpu")
    assert "\n" not in str(caught.value)
