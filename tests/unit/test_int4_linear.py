"""Linears of four bits: grids that come back as they were, rounding, and rows that know no other rows."""

from pathlib import Path

import pytest
import torch
from tests.folders import save_base
from tests.tiny import tiny_dual
from torch import Tensor, nn

from orthrus.model.int4_linear import GROUP, Int4Linear
from orthrus.model.int8_linear import Int8Linear
from orthrus.model.loading import load_dual
from orthrus.model.quantise import quantise, quantise_drafts
from orthrus.model.twin import Twin

OUT, GROUPS = 24, 3


def linear_of(weight_NC: Tensor, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(weight_NC.shape[1], weight_NC.shape[0], bias=bias)
    linear.weight = nn.Parameter(weight_NC)
    return linear


def random_linear(bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(GROUPS * GROUP, OUT, bias=bias, dtype=dtype)


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_0", "fewer steps"])
def test_weights_of_four_bits_are_kept_as_they_are(kind: str) -> None:
    torch.manual_seed(1)
    codes = torch.randint(0, 16, (OUT, GROUPS, GROUP)).float()
    steps = (torch.rand(OUT, GROUPS, 1) * 0.01 + 0.001).half().float()
    least = (torch.randn(OUT, GROUPS, 1) * 0.05).half().float()
    if kind == "Q4_0":
        # Its zero is always the eighth code, and its largest magnitude always code 0.
        codes[..., 0], codes[..., 1:] = 0.0, codes[..., 1:].clamp(1, 14)
        weight = (codes - 8) * steps
    else:
        if kind == "Q4_1":
            codes[..., 0], codes[..., 1] = 0.0, 15.0
        else:
            codes = codes.clamp(0, 11)
            codes[0, 0] = 0.0
        weight = codes * steps + least
    int4 = Int4Linear.of(linear_of(weight.flatten(1)))
    assert torch.equal(int4.unpacked(), weight.flatten(1))


def test_other_weights_are_rounded_to_the_nearest_of_sixteen() -> None:
    plain = random_linear()
    groups = plain.weight.detach().unflatten(1, (-1, GROUP))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (Int4Linear.of(plain).unpacked() - plain.weight).detach().abs().unflatten(1, (-1, GROUP))
    assert (error.amax(-1) <= 0.51 * step).all()
    assert (error.mean(-1) > 0.15 * step).all()


def test_weights_come_in_whole_groups() -> None:
    with pytest.raises(ValueError, match="48 inputs are no groups of 32"):
        Int4Linear.of(nn.Linear(48, 8))


@torch.inference_mode()
def by_hand(int4: Int4Linear, x: Tensor) -> Tensor:
    weight, rows = int4.unpacked().double(), []
    for row in x.double().split(1):
        groups = row.view(-1, GROUP)
        scales = groups.abs().amax(1, keepdim=True) / 127
        rows.append(((groups / scales).round() * scales).flatten() @ weight.T)
    return torch.stack(rows).float() + (0 if int4.bias is None else int4.bias)


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_it_is_its_arithmetic(bias: bool) -> None:
    int4 = Int4Linear.of(random_linear(bias))
    for num_rows in (1, 2, 9):
        x = torch.randn(num_rows, GROUPS * GROUP) * torch.logspace(-2, 2, GROUPS * GROUP)
        torch.testing.assert_close(int4(x), by_hand(int4, x), atol=1e-4, rtol=1e-4)
    assert int4(torch.randn(1, 0, GROUPS * GROUP)).shape == (1, 0, OUT)
    assert Int4Linear.of(random_linear(dtype=torch.bfloat16))(x.bfloat16()).dtype == torch.bfloat16


def test_what_becomes_of_a_models_linears() -> None:
    dual = tiny_dual("llama", disturb=0.3)
    quantise(dual, "int4")
    assert dual.precision == "int4"
    assert type(dual.base.get_output_embeddings()) is Int8Linear
    kinds = {name.split(".")[-1]: type(m) for name, m in dual.base.named_modules()}
    assert (kinds["up_proj"], kinds["down_proj"]) == (Int4Linear, Int8Linear)
    twins = [m for m in dual.base.modules() if isinstance(m, Twin)]
    assert {type(twin.ar) for twin in twins} == {Int4Linear}
    assert {type(twin.diffusion) for twin in twins} == {Int8Linear}


def test_drafts_alone_in_four_bits() -> None:
    dual = tiny_dual("llama", disturb=0.3)
    quantise_drafts(dual, "int4")
    twins = {name.split(".")[-1]: m for name, m in dual.base.named_modules() if isinstance(m, Twin)}
    assert type(twins["up_proj"].diffusion) is Int4Linear
    assert type(twins["q_proj"].diffusion) is Int8Linear
    assert {type(twin.ar) for twin in twins.values()} == {nn.Linear}


def test_drafts_of_four_bits_beside_a_model_of_int8(tmp_path: Path) -> None:
    """Both are made of the weights as they were loaded."""
    folder = save_base(tmp_path / "model")
    _, dual = load_dual(str(folder), "untrained", device="cpu", dtype="int8", draft_dtype="int4")
    assert (dual.precision, dual.draft_precision) == ("int8", "int4")
    up = next(m for name, m in dual.base.named_modules() if name.endswith("up_proj"))
    assert isinstance(up, Twin)
    assert (type(up.ar), type(up.diffusion)) == (Int8Linear, Int4Linear)
