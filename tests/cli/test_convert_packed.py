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
    _, dual = load_dual(model_folder, "untrained")
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
        for view in ("untrained", str(tmp_path / "packed"))
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


def test_licence_and_figures_go_into_the_view_and_onto_its_card(
    cli: Cli, model_folder: str, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    figures.write_text('[{"set": "gsm8k", "tokens_per_cycle": 3.65}]')
    options = ("--license", "apache-2.0", "--figures", str(figures))
    assert cli("convert", model_folder, str(tmp_path / "view"), *options).code == 0
    # What was said once stays, as long as nothing else is said.
    assert cli("convert", str(tmp_path / "view"), str(tmp_path / "again"), "--license", "mit").code == 0
    for folder, licence in (("view", "apache-2.0"), ("again", "mit")):
        provenance = json.loads((tmp_path / folder / "view_config.json").read_text())["provenance"]
        assert provenance == {"license": licence, "figures": [{"set": "gsm8k", "tokens_per_cycle": 3.65}]}
        card = (tmp_path / folder / "README.md").read_text()
        assert f"license: {licence}\n" in card
        assert "| gsm8k | 3.65 |" in card
    target = str(tmp_path / "none")
    assert_refused(cli("convert", model_folder, target, "--figures", str(tmp_path / "x")), "cannot be read")
    assert_refused(cli("convert", model_folder, target, "--license", " "), "--license is empty")


def test_the_mean_of_views_comes_from_the_command_line(cli: Cli, model_folder: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert cli("convert", model_folder, str(tmp_path / name)).code == 0
    made = cli("convert", str(tmp_path / "one"), str(tmp_path / "mean"), "--average", str(tmp_path / "two"))
    assert made.code == 0
    provenance = json.loads((tmp_path / "mean" / "view_config.json").read_text())["provenance"]
    assert provenance == {"averaged": [{}]}
    target = str(tmp_path / "none")
    options = ("--average", str(tmp_path / "nowhere"))
    assert_refused(cli("convert", str(tmp_path / "one"), target, *options), "nowhere")
