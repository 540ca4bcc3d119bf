"""int8 linears against arithmetic written out, and models whose linears become such."""

from pathlib import Path

import pytest
import torch
from tests.rows import Rows
from tests.tiny import tiny_dual
from torch import Tensor, nn

from orthrus.errors import CheckpointError, UserInputError
from orthrus.model import int8_linear
from orthrus.model.checkpoint import save_view
from orthrus.model.dual_view import DualView
from orthrus.model.int8_linear import Int8Linear, check_quantised
from orthrus.model.merged import save_merged
from orthrus.model.passes import causal, tree
from orthrus.model.quantise import quantise, quantise_drafts
from orthrus.model.twin import Twin, twins


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 40, bias=bias, dtype=dtype)


@torch.inference_mode()
def by_hand(plain: nn.Linear, x: Tensor) -> Tensor:
    scales = plain.weight.abs().amax(1) / 127
    weight = (plain.weight / scales[:, None]).round().double()
    rows = []
    for row in x.double():
        scale = row.abs().max() / 127
        rows.append((row / scale).round() @ weight.T * scale * scales)
    return torch.stack(rows).float() + (0 if plain.bias is None else plain.bias)


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_int8_is_its_arithmetic(bias: bool) -> None:
    plain = linear(bias)
    int8 = Int8Linear.of(plain)
    for num_rows in (1, 2, 9):
        x = torch.randn(num_rows, 48)
        torch.testing.assert_close(int8(x), by_hand(plain, x), atol=1e-5, rtol=1e-5)
    assert int8(torch.randn(1, 0, 48)).shape == (1, 0, 40)
    assert torch.equal(int8(torch.zeros(2, 48)), int8(torch.zeros(1, 48)).expand(2, -1))


@torch.inference_mode()
def test_int8_rows_do_not_know_each_other() -> None:
    """With one scale for all rows the large ones would swallow the small ones."""
    int8 = Int8Linear.of(linear())
    x = torch.randn(17, 48) * torch.logspace(-3, 3, 17)[:, None]
    together = int8(x)
    for i in range(17):
        assert torch.equal(int8(x[i : i + 1])[0], together[i])
        assert torch.equal(int8(x[: i + 1])[i], together[i])


@torch.inference_mode()
def test_int8_keeps_the_dtype_of_its_input() -> None:
    assert Int8Linear.of(linear(dtype=torch.bfloat16))(torch.randn(3, 48).bfloat16()).dtype == torch.bfloat16


def logits_alone_and_together(dual: DualView) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 60, (12,)).tolist()
    rows = Rows(dual)
    return torch.cat([rows.feed([token_id]) for token_id in ids]), Rows(dual).feed(ids)


def test_each_rows_logits_hang_on_no_other_row() -> None:
    dual = tiny_dual("llama", disturb=0.3)
    plain, _ = logits_alone_and_together(dual)
    quantise(dual, "int8")
    alone, together = logits_alone_and_together(dual)
    # Quantising moves logits far more than the shape of a pass does.
    assert (alone - together).abs().mean() < 0.1 * (alone - plain).abs().mean()


def test_quantise_leaves_no_plain_linear_behind() -> None:
    dual = tiny_dual("qwen3", disturb=0.3)
    quantise(dual, "int8")
    assert dual.precision == "int8"
    assert not any(type(module) is nn.Linear for module in dual.base.modules())


def test_quantised_drafts_leave_the_ar_rows_alone() -> None:
    part = causal(torch.randint(3, 60, (9,)).tolist())
    dual = tiny_dual("llama", disturb=0.3)
    before = Rows(dual).logits(part)
    quantise_drafts(dual, "int8")
    after = Rows(dual).logits(part)
    assert torch.equal(before, after)
    assert all(isinstance(m.diffusion, Int8Linear) for m in dual.base.modules() if isinstance(m, Twin))
    model = dual.stock()
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


@pytest.mark.parametrize("exact", [True, False])
@torch.inference_mode()
def test_int8_sums_are_exact_in_either_way(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sums that there are: 16 bits do not hold two of their products, float32 not all of them."""
    if exact and not int8_linear.onednn_is_exact():
        pytest.skip("needs a processor with instructions for int8")
    monkeypatch.setattr(int8_linear, "onednn_is_exact", lambda: exact)
    int8_NC = torch.full((4, 3001), 127, dtype=torch.int8)
    int8_NC[1] = -127
    int8 = Int8Linear(int8_NC, torch.ones(4), None)
    x = torch.full((2, 3001), 127.0)
    x[1, ::2] = -127.0
    assert int8(x).tolist() == (x.double() @ int8_NC.double().t()).float().tolist()


@torch.inference_mode()
def test_onednn_has_code_for_int8_here(capfd: pytest.CaptureFixture[str]) -> None:
    """For shapes of signed numbers that it has no code for, it runs a loop a hundred times as slow."""
    if not int8_linear.onednn_is_exact():
        pytest.skip("needs a processor with instructions for int8")
    int8 = Int8Linear.of(linear())
    for num_rows in (1, 2, 9, 200):
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            int8(torch.randn(num_rows, 48))
        said = capfd.readouterr().out
        assert ",exec,cpu,matmul," in said
        assert ",ref" not in said


def test_where_int8_does_not_run() -> None:
    with pytest.raises(
        UserInputError, match="int8 runs on CPUs only, not on cuda: choose device 'cpu', or another dtype"
    ):
        check_quantised("int8", torch.device("cuda"))


@pytest.mark.parametrize("part", [quantise, quantise_drafts])
def test_int8_is_not_saved(part: object, tmp_path: Path) -> None:
    dual = tiny_dual("llama")
    before = dual.num_view_parameters()
    part(dual, "int8")  # type: ignore[operator]
    assert dual.num_view_parameters() == before
    for save in (save_view, lambda d, folder: save_merged(d, None, folder)):
        with pytest.raises(CheckpointError, match="load it in another dtype"):
            save(dual, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_low_rank_twins_draft_in_the_precision_of_their_ar_side() -> None:
    dual = tiny_dual("llama", disturb=0.3, rank=4)
    before = [name for name in twins(dual.base) if "self_attn" in name]
    quantise_drafts(dual, "int8")
    assert [name for name in twins(dual.base) if "self_attn" in name] == before
    part = tree([5, 6, 7, 8, 9], [0, 1, 2, 3], [1], 8, 60)
    assert Rows(dual).logits(part).isfinite().all()
    model = dual.stock()
    assert not any(isinstance(module, Twin) for module in model.modules())
