"""`orthrus convert --encoding delta4`: a view folder an eighth of the size that drafts alike."""

import json
from pathlib import Path

from tests.tiny import disturb_view

from orthrus.model.checkpoint import save_view
from orthrus.model.loading import load_dual

from .conftest import Cli, assert_refused


def test_a_packed_view_is_small_and_generates_the_same_text(
    cli: Cli, model_folder: str, tmp_path: Path
) -> None:
    _, dual = load_dual(model_folder, "fresh")
    disturb_view(dual, 0.1)
    save_view(dual, tmp_path / "view")
    run = cli("convert", str(tmp_path / "view"), str(tmp_path / "packed"), "--encoding", "delta4")
    assert run.code == 0
    assert "written files read back" in run.out
    config = json.loads((tmp_path / "packed" / "view_config.json").read_text())
    assert config["encoding"] == "delta4"
    assert "4-bit differences" in (tmp_path / "packed" / "README.md").read_text()
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("view", "packed")
    ]
    assert sizes[1] < 0.4 * sizes[0]
    options = ("-n", "24", "--ignore-eos", "--quiet", "--view")
    texts = {
        cli("generate", model_folder, "hi", *options, view).out
        for view in ("fresh", str(tmp_path / "packed"))
    }
    assert len(texts) == 1

    again = cli("convert", str(tmp_path / "packed"), str(tmp_path / "again"), "--encoding", "delta4")
    assert again.code == 0
    files = [tmp_path / name / "view.safetensors" for name in ("packed", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    merged = cli("convert", str(tmp_path / "packed"), str(tmp_path / "merged"), "--to", "merged")
    assert merged.code == 0
    assert json.loads((tmp_path / "merged" / "view_config.json").read_text())["encoding"] == "full"


def test_only_views_are_packed(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    options = ("--to", "merged", "--encoding", "delta4")
    assert_refused(cli("convert", model_folder, str(tmp_path / "out"), *options), "views only")
