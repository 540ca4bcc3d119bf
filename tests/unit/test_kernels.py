"""Our kernels against PyTorch's linears and choices, and rows that know no other rows."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rows import slot_by_slot
from tests.tiny import VOCAB, tiny_dual
from torch import Tensor, nn

from orthrus.kernels import best, build, pairs
from orthrus.kernels.build import load_kernels
from orthrus.kernels.linear import FewRowsLinear, FewRowsTwin, fast_linear, fast_twin, has_tiles
from orthrus.model import pool
from orthrus.model.drafting import RepairTables
from orthrus.model.int4_linear import Int4Linear
from orthrus.model.int8_linear import Int8Linear
from orthrus.model.twin import RowSplit, Twin

QUANTISED: dict[str, Any] = {"int8": Int8Linear, "int4": Int4Linear}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = [*DTYPES, *QUANTISED]
# Whole blocks of outputs and not, an odd number of inputs, more inputs than int8 sums hold in float32.
SIZES = [(48, 96), (33, 17), (70, 48), (5, 3008)]
LAYOUTS = pytest.mark.parametrize(
    ("kind", "tiles"),
    [*((kind, False) for kind in KINDS), ("bfloat16", True), ("int8", True)],
    ids=lambda value: ["plain", "tiles"][value] if isinstance(value, bool) else value,
)


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    load_kernels()


def linear(outputs: int, inputs: int, kind: str, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    if kind in QUANTISED:
        # Four bits take whole groups of inputs.
        inputs = inputs if kind == "int8" else -(-inputs // 32) * 32
        return QUANTISED[kind].of(nn.Linear(inputs, outputs, bias=bias))
    return nn.Linear(inputs, outputs, bias=bias, dtype=DTYPES[kind])


def fast(slow: nn.Module, tiles: bool) -> FewRowsLinear:
    if tiles and not has_tiles():
        pytest.skip("needs AMX")
    return FewRowsLinear.of([slow], tiles=tiles)


def rows(num: int, size: int, kind: str) -> Tensor:
    x = torch.randn(num, size) * torch.logspace(-1, 1, num)[:, None]
    return x.bfloat16() if kind == "bfloat16" else x


@LAYOUTS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@torch.inference_mode()
def test_it_is_the_linear(outputs: int, inputs: int, bias: bool, tiles: bool, kind: str) -> None:
    slow = linear(outputs, inputs, kind, bias)
    ours = fast(slow, tiles)
    inputs = ours.in_features
    for num in (0, 1, 2, 7, 33, 150):
        x = rows(num, inputs, kind)
        assert ours(x).shape == (num, outputs)
        if kind == "int8":
            assert torch.equal(ours(x), slow(x))
        else:
            torch.testing.assert_close(
                ours(x), slow(x), atol=2e-5, rtol=1e-2 if x.dtype.itemsize == 2 else 1e-5
            )
    assert ours(rows(6, inputs, kind).view(2, 3, inputs)).shape == (2, 3, outputs)


@LAYOUTS
@torch.inference_mode()
def test_rows_do_not_know_each_other(tiles: bool, kind: str) -> None:
    ours = fast(linear(200, 576, kind), tiles)
    x = rows(60, 576, kind)
    together = ours(x)
    for first, last in ((0, 1), (7, 9), (3, 11), (0, 17), (20, 49), (11, 60)):
        assert torch.equal(ours(x[first:last]), together[first:last])


@torch.inference_mode()
def test_int8_in_a_model_of_bfloat16() -> None:
    slow = Int8Linear.of(nn.Linear(32, 20, dtype=torch.bfloat16))
    x = rows(5, 32, "bfloat16")
    assert torch.equal(fast(slow, tiles=False)(x), slow(x))


@LAYOUTS
@torch.inference_mode()
def test_what_is_no_number_stays_none(kind: str, tiles: bool) -> None:
    ours = fast(linear(20, 33, kind), tiles=tiles)
    x = rows(2, ours.in_features, kind)
    for place in (3, 32):
        x[0, place] = torch.nan
        out = ours(x)
        assert out[0].isnan().all()
        assert out[1].isfinite().all()
        x[0, place] = 1.0


def test_what_does_not_fit_is_refused() -> None:
    ours = fast(linear(20, 32, "int8"), tiles=False)
    with pytest.raises(RuntimeError, match="inputs that do not fit"):
        ours(torch.ones(2, 40))
    with pytest.raises(RuntimeError, match="inputs that do not fit"):
        fast(linear(20, 64, "int4"), tiles=False)(torch.ones(2, 50))
    packed = ours.weight.transpose(2, 3).contiguous()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="packed for another processor"):
        torch.ops.orthrus.few_rows_linear(torch.ones(2, 32), packed, ours.scales, None, 20)
    with pytest.raises(RuntimeError, match="scales are for weights of int8"):
        torch.ops.orthrus.few_rows_linear(torch.ones(2, 32), ours.weight, None, None, 20)


@pytest.mark.timeout(900)
def test_damaged_kernels_are_made_anew(tmp_path: Path) -> None:
    """And on shorter vectors without dot products, as other processors have them, these and attention's tests hold.

    Where vectors are short anyhow one of the tests will do.
    """
    files = [__file__, str(Path(__file__).with_name("test_kernel_attention.py"))]
    program = f"""
import sys, pytest, torch._inductor.config
from orthrus.kernels import build
torch._inductor.config.cpp.simdlen = 256
build.FLAGS += ["-mno-avx512f", "-mno-avxvnni"] * torch.cpu._is_avx512_supported()
made = build._build
def made_damaged(folder):
    build._build = made
    (folder / "damaged.so").write_bytes(b"damaged")
    return folder / "damaged.so"
build._build = made_damaged
with pytest.raises(OSError):
    build.load_kernels()
build.load_kernels()
others = "not made_anew and not nothing_behind" if torch.cpu._is_avx512_supported() else "both_of_its_linears"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *{files!r}, "-k", others]))
"""
    environment = {**os.environ, "ORTHRUS_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@LAYOUTS
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_twin_is_both_of_its_linears(bias: bool, kind: str, tiles: bool) -> None:
    bias = bias and kind not in QUANTISED
    torch.manual_seed(3)
    ar, diffusion = (fast(linear(70, 64, kind, bias), tiles) for _ in range(2))
    diffusion.weight = diffusion.weight.flip(0)
    split = RowSplit()
    twin = fast_twin(ar, diffusion, split)
    assert isinstance(twin, FewRowsTwin)
    for num, num_ar in ((9, 1), (9, 9), (9, 0), (50, 3), (70, 36), (5, 4), (80, 16), (96, 32)):
        x = rows(num, 64, kind)[None]
        with split.at(num_ar):
            together = twin(x)
        assert torch.equal(together, torch.cat([ar(x[:, :num_ar]), diffusion(x[:, num_ar:])], 1))


@pytest.mark.parametrize("kinds", [("int4", "int8"), ("int8", "int4")])
@torch.inference_mode()
def test_a_twin_of_two_layouts(kinds: tuple[str, str]) -> None:
    ar, diffusion = (fast_linear([linear(70, 64, kind, bias=False)]) for kind in kinds)
    split = RowSplit()
    twin = fast_twin(ar, diffusion, split)
    assert isinstance(twin, FewRowsTwin)
    assert ar is not None
    assert diffusion is not None
    for num, num_ar in ((9, 1), (9, 9), (9, 0), (50, 13)):
        x = rows(num, 64, "int8")[None]
        with split.at(num_ar):
            together = twin(x)
        assert torch.equal(together, torch.cat([ar(x[:, :num_ar]), diffusion(x[:, num_ar:])], 1))


def test_unlike_linears_make_a_twin_of_two_products() -> None:
    ar, diffusion = fast(linear(70, 48, "float32"), False), fast(linear(70, 48, "int8"), False)
    twin = fast_twin(ar, diffusion, RowSplit())
    assert type(twin) is Twin
    assert fast_twin(ar, None, RowSplit()) is None


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_joined_linears_are_those_linears_side_by_side(kind: str) -> None:
    parts = [linear(size, 64, kind, bias) for size, bias in ((40, True), (8, False), (16, True))]
    joined = fast_linear(parts)
    assert joined is not None
    x = rows(3, 64, kind)
    expected = torch.cat([part(x) for part in parts], -1)
    torch.testing.assert_close(
        joined(x), expected, rtol=0 if kind == "int8" else None, atol=0 if kind == "int8" else None
    )


def test_what_cannot_be_laid_out_is_left() -> None:
    half = nn.Linear(8, 8, dtype=torch.float16)
    assert fast_linear([half]) is None
    assert fast_linear([linear(8, 8, "float32"), linear(8, 8, "bfloat16")]) is None
    assert fast_linear([linear(8, 8, "float32"), linear(8, 8, "int8")]) is None
    assert fast_linear([linear(8, 32, "int4"), linear(8, 32, "int8")]) is None
    assert fast_linear([nn.Identity()]) is None


def test_sources_that_do_not_compile_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("no such code")
    monkeypatch.setattr(build, "SOURCES", [broken])
    monkeypatch.setattr(build, "_are_loaded", threading.Event())
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(Exception, match="compile"):
        load_kernels()
    assert {path.suffix for path in (tmp_path / "cache" / "compiled").iterdir()} == {".lock"}


@pytest.mark.parametrize("size", [5, 16, 300, 4097])
@pytest.mark.parametrize("num", [1, 3, 16])
def test_best_tokens_are_those_of_topk(size: int, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(size + num)
    num = min(num, size)
    scores_RV = torch.randn(4, size) * 4
    # All candidates in one chunk; what a filter has left over; nothing but what it has thrown away.
    scores_RV[1] = torch.linspace(3, -3, size)
    scores_RV[2, num:] = -torch.inf
    scores_RV[3] = -torch.inf
    values_RN, ids_RN, totals_R1 = best.best_tokens(scores_RV, num)
    assert torch.equal(values_RN, scores_RV.gather(1, ids_RN))
    monkeypatch.setattr(best, "kernels_loaded", lambda: False)
    slow_RN, _, slow_R1 = best.best_tokens(scores_RV, num)
    assert torch.equal(values_RN, slow_RN)
    torch.testing.assert_close(totals_R1, slow_R1)
    assert all(len(set(row)) == num for row in ids_RN.tolist())


def test_best_tokens_of_equal_scores_are_the_first_ones() -> None:
    scores_RV = torch.randint(0, 3, (5, 700), generator=torch.Generator().manual_seed(0)).float()
    _, ids_RN, _ = best.best_tokens(scores_RV, 16)
    assert torch.equal(ids_RN, scores_RV.sort(dim=1, descending=True, stable=True).indices[:, :16])


def test_best_tokens_leave_out_what_is_no_number() -> None:
    scores_RV = torch.full((2, 300), torch.nan)
    scores_RV[0, [7, 200]] = torch.tensor([1.0, 2.0])
    values_RN, ids_RN, _ = best.best_tokens(scores_RV, 3)
    assert ids_RN[0, :2].tolist() == [200, 7]
    assert values_RN.isnan().tolist() == [[False, False, True], [True, True, True]]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rank", [3, 16, 37])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_pairs_are_those_of_the_repair_head(
    dtype: torch.dtype, rank: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dual = tiny_dual("llama", repair_rank=rank).to(dtype)
    assert dual.repair is not None
    torch.manual_seed(rank)
    nn.init.normal_(dual.repair.out.weight, 0.0, 0.5)
    tables = RepairTables.of(dual)
    hidden_DC, scores_DV = torch.randn(5, 32, dtype=dtype), torch.randn(5, VOCAB) * 3
    scores_DV[1] = -torch.inf
    scores_DV[1, :2] = torch.tensor([1.0, 2.0])
    top, totals_D1 = scores_DV.topk(8), scores_DV.logsumexp(-1, keepdim=True)
    parents_DP = torch.randint(0, VOCAB, (5, 4))
    given = dual, tables, hidden_DC, parents_DP, top.indices, top.values, totals_D1, temperature
    with torch.inference_mode():
        ours_DPM = pairs.repaired_pairs(*given)
        monkeypatch.setattr(pairs, "kernels_loaded", lambda: False)
        slow_DPM = pairs.repaired_pairs(*given)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours_DPM, slow_DPM, atol=tolerance, rtol=tolerance)
    assert ours_DPM[1, :, 2:].isneginf().all()
    assert (ours_DPM[2, 0] - ours_DPM[2, 1]).abs().max() > 0.1


@pytest.mark.parametrize("size", [1, 16, 300, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_best_is_that_of_argmax(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    scores_RV = (torch.randn(6, size) * 4).to(dtype)
    scores_RV[1] = scores_RV[1].round()
    scores_RV[2] = -torch.inf
    scores_RV[3] = torch.linspace(-3, 3, size)
    scores_RV[4, : size // 2] = torch.nan
    found_R = best.first_best(scores_RV)
    expected_R = scores_RV.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(
        dim=1, descending=True, stable=True
    )
    assert torch.equal(found_R, expected_R.indices[:, 0])
    assert best.first_best(scores_RV[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slots_move_as_they_are_indexed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # One of them a window on a longer store.
    stores = [torch.randn(1, 3, 20, 5).to(dtype), torch.randn(1, 2, 40, 7).to(dtype)[:, :, 3:30]]
    expected = [store.clone() for store in stores]
    sources, targets = [8, 9, 13, 14, 19], [8, 4, 9, 10, 2]
    pool.move_slots(expected, sources, targets)
    torch.ops.orthrus.move_slots(stores, sources, targets)
    for store, other in zip(stores, expected, strict=True):
        assert torch.equal(store, other)
    keys = torch.randn(1, 3, 2 * pool.PAGE, 5).to(dtype)
    transposed = pool.transposed(keys)
    assert transposed.shape == (1, 3, 2, 5, pool.PAGE)
    assert torch.equal(slot_by_slot(transposed), keys)
    there, back = [pool.PAGE, 70, 127, 5], [62, pool.PAGE + 1, 3, 4]
    pool.move_slots([keys], there, back)
    torch.ops.orthrus.move_slots([transposed], there, back)
    assert torch.equal(slot_by_slot(transposed), keys)
    with pytest.raises(RuntimeError, match="does not have"):
        torch.ops.orthrus.move_slots([transposed], [2 * pool.PAGE], [0])
    for wrong in (([7], [8, 9]), ([20], [1]), ([1], [20]), ([-1], [1])):
        with pytest.raises(RuntimeError, match="move_slots"):
            torch.ops.orthrus.move_slots(stores, *wrong)
