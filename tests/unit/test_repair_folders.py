"""A repair head in every kind of folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.folders import save_base
from tests.tiny import disturb_view, tiny_dual

import orthrus
from orthrus.base.loading import load_base
from orthrus.base.resolve import resolve
from orthrus.errors import CheckpointError
from orthrus.model.checkpoint import load_view, save_view, untrained_view
from orthrus.model.loading import load_dual
from orthrus.model.merged import save_merged


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """`base`, and its view with a head in `full`, `packed` and `merged`."""
    base = load_base(resolve(str(save_base(tmp_path / "base"))), device="cpu")
    dual = untrained_view(base, 6)
    dual.add_repair(5)
    disturb_view(dual, 0.2)
    save_view(dual, tmp_path / "full")
    save_view(dual, tmp_path / "packed", "delta4")
    save_merged(dual, base, tmp_path / "merged")
    return tmp_path


def test_the_head_comes_back_from_every_folder(folders: Path) -> None:
    _, dual = load_dual(str(folders / "base"), str(folders / "full"), device="cpu")
    expected = dual.view_parameters()
    assert {n.partition(".")[0] for n in expected} == {"model", "repair"}
    assert dual.repair is not None
    assert dual.repair.out.weight.any()
    merged = orthrus.OrthrusForCausalLM.from_pretrained(folders / "merged").dual
    assert merged.config == dual.config
    assert all(torch.equal(p, expected[n]) for n, p in merged.view_parameters().items())
    stored = load_file(folders / "packed" / "view.safetensors")
    assert stored["repair.out.weight"].dtype == torch.bfloat16
    _, packed = load_dual(str(folders / "base"), str(folders / "packed"), device="cpu")
    for n, parameter in packed.view_parameters().items():
        if n.startswith("repair."):
            assert torch.equal(parameter, expected[n].bfloat16().float()), n
    save_view(packed, folders / "again", "delta4")
    files = [folders / name / "view.safetensors" for name in ("packed", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("rank", "message"),
    [(None, "has 4 tensors too many, repair.hidden.bias first"), (7, r"hidden.weight has shape \(5, 32\)")],
)
def test_a_rank_that_does_not_fit_the_weights_is_refused(
    folders: Path, rank: int | None, message: str
) -> None:
    file = folders / "full" / "view_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repair_rank": rank}))
    base = load_base(resolve(str(folders / "base")), device="cpu")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_view(base, folders / "full")
    assert "\n" not in str(caught.value)


def test_the_card_says_so(folders: Path) -> None:
    assert "| repair head | of rank 5 |" in (folders / "packed" / "README.md").read_text()


def test_the_released_layout_has_no_place_for_it(tmp_path: Path) -> None:
    dual = tiny_dual("qwen3", repair_rank=4)
    with pytest.raises(CheckpointError, match="no place for a repair head; write a merged folder"):
        save_merged(dual, None, tmp_path / "out", "released")
    assert not list(tmp_path.iterdir())
