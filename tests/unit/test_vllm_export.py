"""`orthrus export vllm`: folders whose twins are full, and give the logits that the view had."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.folders import save_base
from tests.tiny import VARIANTS, disturb_view
from typer.testing import CliRunner

from orthrus.base.loading import Base, load_base
from orthrus.base.resolve import resolve
from orthrus.cli.app import app
from orthrus.errors import CheckpointError, UnsupportedModelError
from orthrus.integrations.vllm.export import export_vllm, full_view
from orthrus.model.checkpoint import assign_view, read_json, untrained_view
from orthrus.model.dual_view import DualView
from orthrus.model.loading import load_dual
from orthrus.model.merged import weight_files

FAMILIES = ("llama-tied", "qwen2", "qwen3", "mistral")


def bare(folder: Path) -> Base:
    """The base of a folder without a view."""
    return load_base(resolve(str(folder)), device="cpu")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("variant", ["all", "no o", "rank 4"])
def test_an_exported_view_has_full_twins_that_project_the_same(
    tmp_path: Path, name: str, variant: str
) -> None:
    folder = save_base(tmp_path / "base", name)
    base, options = bare(folder), dict(VARIANTS[variant])
    if "twins" in options:
        options["twins"] = [n for n in options["twins"] if n in base.family.twin_names]
    dual = untrained_view(base, **options)
    disturb_view(dual, 0.2)
    config = export_vllm(dual, base, tmp_path / "out")
    written = read_json(tmp_path / "out" / "config.json")
    assert written["architectures"] == [f"Orthrus{dual.family.name}ForCausalLM"]
    assert written["orthrus"]["rank"] is None
    assert written["orthrus"]["twins"] is None
    _, tensors = full_view(dual)
    on_disk = {}
    for file in weight_files(tmp_path / "out"):
        with safe_open(file, framework="pt") as f:
            on_disk |= {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
    assert all(torch.equal(on_disk[n], t) for n, t in tensors.items())
    full = DualView(bare(folder).model, dual.family, config)
    assign_view(full, tensors, where="memory")
    ids = torch.tensor([[5, 6, 7, 8]])
    with dual.split.at(0), full.split.at(0), torch.inference_mode():
        torch.testing.assert_close(full.base(ids).logits, dual.base(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_view_of_some_layers_says_which(tmp_path: Path) -> None:
    base = bare(save_base(tmp_path / "base"))
    config, tensors = full_view(untrained_view(base, layers=[1]))
    assert config.layers == (1,)
    assert all(".layers.1." in name for name in tensors if "layers" in name)


def test_twins_in_the_mlp_are_refused(tmp_path: Path) -> None:
    dual = untrained_view(bare(save_base(tmp_path / "base")), twins=["q_proj", "up_proj"])
    with pytest.raises(CheckpointError, match="MLP"):
        full_view(dual)


def test_other_families_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base, dual = load_dual(str(save_base(tmp_path / "base", "gemma2")), "untrained", device="cpu")
    with pytest.raises(UnsupportedModelError, match="Gemma2"):
        export_vllm(dual, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_names_the_command_that_serves(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    found = CliRunner().invoke(
        app,
        ["export", "vllm", str(tmp_path / "base"), str(tmp_path / "out"), "--view", "untrained", "--quiet"],
    )
    assert found.exit_code == 0, found.output
    assert "vllm serve" in found.output
    assert "orthrus.integrations.vllm" in found.output
