"""Views packed as 4-bit differences: how close they come back, that they stay put, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_dual
from tests.tiny_orthrus import tiny_orthrus

from orthrus.base.loading import Base
from orthrus.errors import CheckpointError, CorruptFileError, UserInputError
from orthrus.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_view, save_view
from orthrus.model.delta_codec import GROUP, decode_tensors, encode_tensors, quantise
from orthrus.model.twin import twins


def matrices(rows: int, num_inputs: int, scale: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """(AR weight, view weight)."""
    generator = torch.Generator().manual_seed(rows * 1000 + num_inputs)
    base = torch.randn(rows, num_inputs, generator=generator) * 0.1
    return base, base + torch.randn(rows, num_inputs, generator=generator) * scale


@pytest.mark.parametrize("num_inputs", [1, 2, 63, 64, 65, 127, 200, 576])
def test_round_trip_error_is_that_of_four_bits(num_inputs: int) -> None:
    base, view = matrices(24, num_inputs)
    stored = encode_tensors({"q.weight": view}, {"q.weight": base})
    assert stored["q.weight.codes"].shape == (24, -(-num_inputs // 2))
    assert stored["q.weight.scales"].shape == (24, -(-num_inputs // GROUP))
    found = decode_tensors(stored, {"q.weight": base}, where="here")["q.weight"]
    delta = view - base
    assert (found - view).square().sum() < 0.015 * delta.square().sum()
    # No value is off by more than half a step, except those that the search chose to clip.
    _, scales = quantise(delta)
    steps = scales.float().repeat_interleave(GROUP, 1)[:, :num_inputs]
    assert ((found - view).abs() <= 4 * steps + 1e-7).all()


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("num_inputs", [5, 64, 150, 576])
def test_packing_what_was_unpacked_gives_equal_bytes(num_inputs: int, scale: float) -> None:
    base, view = matrices(48, num_inputs, scale)
    first = encode_tensors({"q.weight": view}, {"q.weight": base})
    again = encode_tensors(decode_tensors(first, {"q.weight": base}, where="here"), {"q.weight": base})
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_untouched_view_packs_to_nothing() -> None:
    base, _ = matrices(4, 70)
    stored = encode_tensors({"q.weight": base}, {"q.weight": base})
    assert not stored["q.weight.scales"].any()
    assert torch.equal(decode_tensors(stored, {"q.weight": base}, where="here")["q.weight"], base)


def test_a_better_scale_than_the_largest_value_gives_is_found() -> None:
    delta = torch.randn(64, GROUP, generator=torch.Generator().manual_seed(0))
    codes, scales = quantise(delta)
    error = (delta - codes * scales.float()).square().sum()
    plain = delta.abs().amax(1, keepdim=True) / 7
    assert error < 0.9 * (delta - (delta / plain).round() * plain).square().sum()


@pytest.mark.parametrize(("scale", "code", "odd"), [(0.003082275390625, 5, -6), (0.003082275390625, 7, -6)])
def test_a_group_that_was_packed_finds_its_codes_again(scale: float, code: int, odd: int) -> None:
    """Codes close to one size, where a coarser scale fits nearly as well and is tried first."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (1, GROUP), generator=generator) * (2 * code) - code
    codes[0, -1] = odd
    base = torch.randn(1, GROUP, generator=generator)
    found, scales = quantise((base + codes * scale) - base)
    assert torch.equal(found.int(), codes.int())
    assert scales.item() == scale


def packed(folder: Path, name: str = "llama") -> tuple[Path, dict[str, torch.Tensor]]:
    """A packed view of a tiny model, and its exact weights."""
    dual = tiny_dual(name, disturb=0.1, mask_token_id=None)
    save_view(dual, folder, "delta4")
    return folder, {n: p.detach().clone() for n, p in dual.view_parameters().items()}


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "phi3", "olmo2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_of_all_layouts_load_on_both_precisions(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    folder, exact = packed(tmp_path / "view", name)
    base = tiny_orthrus(name, disturb=0.0, dtype=dtype).base
    without_view(base)
    dual = load_view(base, folder)
    assert dual.config.encoding == "full"
    for n, parameter in dual.view_parameters().items():
        assert parameter.dtype == dtype, n
        spread = exact[n].abs().max()
        assert (parameter.float() - exact[n]).abs().max() <= 0.1 * spread, n
    if dtype == torch.float32:
        save_view(dual, tmp_path / "again", "delta4")
        assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == (folder / WEIGHTS_FILE).read_bytes()


def without_view(base: Base) -> None:
    """Take the twins out for good, as a base looks before it gets a view."""
    for path, twin in twins(base.model).items():
        parent, _, name = path.rpartition(".")
        setattr(base.model.get_submodule(parent), name, twin.ar)


def test_a_run_replaces_its_own_view_and_no_other(tmp_path: Path) -> None:
    dual = tiny_dual(disturb=0.1)
    save_view(dual, tmp_path / "view", owner="run")
    save_view(dual, tmp_path / "view", "delta4", owner="run")
    assert [p.name for p in tmp_path.iterdir()] == ["view"]
    with pytest.raises(UserInputError, match="not written by this run"):
        save_view(dual, tmp_path / "view", owner="another")
    assert json.loads((tmp_path / "view" / CONFIG_FILE).read_text())["encoding"] == "delta4"


@pytest.mark.parametrize("damage", ["codes", "shape", "nan", "code", "dtype", "lacks"])
def test_damaged_tensors_are_one_sentence(tmp_path: Path, damage: str) -> None:
    folder, _ = packed(tmp_path / "view")
    tensors = load_file(folder / WEIGHTS_FILE)
    name = "model.layers.0.self_attn.q_proj_diff.weight"
    if damage == "codes":
        del tensors[name + ".codes"]
    elif damage == "shape":
        tensors[name + ".scales"] = tensors[name + ".scales"][:-1].clone()
    elif damage == "nan":
        tensors[name + ".scales"][0] = torch.nan
    elif damage == "code":
        tensors[name + ".codes"][0, 0] = 0
    elif damage == "dtype":
        tensors[name + ".scales"] = tensors[name + ".scales"].float()
    else:
        tensors = {n: t for n, t in tensors.items() if not n.startswith(name)}
    save_file(tensors, folder / WEIGHTS_FILE)
    base = tiny_orthrus(disturb=0.0).base
    without_view(base)
    with pytest.raises(CheckpointError if damage == "lacks" else CorruptFileError, match="q_proj_diff") as e:
        load_view(base, folder)
    assert "\n" not in str(e.value)


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    folder, _ = packed(tmp_path / "view")
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"encoding": "delta2"}))
    with pytest.raises(CheckpointError, match="'delta2'"):
        load_view(tiny_orthrus().base, folder)
