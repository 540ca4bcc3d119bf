"""`orthrus adapt` from a log to a verdict: what is kept, what is refused, and the way back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orthrus.base.loading import load_base
from orthrus.base.owned import locked_file
from orthrus.base.resolve import resolve
from orthrus.model.checkpoint import save_view, untrained_view
from orthrus.training import adapt

from .conftest import Cli, assert_refused


@pytest.fixture
def log(tmp_path: Path) -> str:
    records = [{"prompt": f"question {i} of {i * 7}"} for i in range(20)]
    answered = [{"role": "user", "content": "how much"}, {"role": "assistant", "content": "not much at all"}]
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in [*records, {"messages": answered}]))
    return str(file)


@pytest.fixture
def options(tmp_path: Path, model_folder: str) -> list[str]:
    base = load_base(resolve(model_folder), device="cpu")
    dual = untrained_view(base, 4, mask="trained")
    dual.config = replace(dual.config, goes_on=0.5, provenance={"license": "apache-2.0"})
    save_view(dual, tmp_path / "init")
    made = ["--model", model_folder, "--init", str(tmp_path / "init"), "--view", str(tmp_path / "view")]
    return [*made, "--epochs", "1", "-n", "16"]


def always(patch: pytest.MonkeyPatch, gain: float) -> None:
    """Let whatever comes of so short a run count as a gain, or not."""
    patch.setattr(adapt, "LEAST_GAIN", gain)
    patch.setattr(adapt, "MOST_LOSS", 9.0)
    patch.setattr(adapt, "_resampled_low", lambda *_: 1.0)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_better_view_takes_the_place_and_the_way_back_is_open(
    cli: Cli, log: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, -9.0)
    made = cli("adapt", log, *options, "--json")
    assert made.code == 0
    report = json.loads(made.out)
    assert report["kept"]
    assert report["share"] == 1.0
    # One of 17 answers goes round in circles, and nothing is learnt from it.
    assert report["requests"] == {"trained": 16, "held_back": 4}
    assert "17 of 17 requests have answers" in made.err
    view = tmp_path / "view"
    first = bytes_of(view)
    made_of = json.loads(first["view_config.json"])
    assert made_of["trained"]
    assert made_of["provenance"]["license"] == "apache-2.0"
    # Measured on what the log asks, not kept of the view before.
    assert made_of["goes_on"] != 0.5
    assert not report["replaced"]

    again = cli("adapt", log, *options, "--seed", "1")
    assert again.code == 0
    assert "the new view is kept" in again.out
    assert f"{view}.before-1 holds the old one; --rollback restores it" in again.out
    assert bytes_of(tmp_path / "view.before-1") == first
    assert bytes_of(view) != first
    back = cli("adapt", "--rollback", "--view", str(view))
    assert back.code == 0
    assert bytes_of(view) == first
    assert_refused(cli("adapt", "--rollback", "--view", str(view)), "nothing to go back to")
    # What the same log made before is not there any more, so it is made again.
    anew = cli("adapt", log, *options, "--seed", "1")
    assert "judged already" not in anew.err
    assert "the new view is kept" in anew.out
    assert bytes_of(tmp_path / "view.before-1") == first
    assert bytes_of(view) != first


def test_a_view_that_is_no_better_changes_nothing(
    cli: Cli, log: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, 9.0)
    init = bytes_of(tmp_path / "init")
    made = cli("adapt", log, *options)
    assert made.code == 0
    assert "not kept, and nothing was changed" in made.out
    assert not (tmp_path / "view").exists()
    assert bytes_of(tmp_path / "init") == init
    # The same question has been answered.
    again = cli("adapt", log, *options)
    assert again.code == 0
    assert "judged already" in again.err
    assert again.out == made.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["give the log"]),
        (["--rollback", "LOG"], ["--rollback takes no log"]),
        (["LOG", "--held-back", "1"], ["held-back must lie between 0 and 1"]),
        (["LOG", "--init", "nowhere"], ["nowhere holds no view"]),
        (["LOG", "--init", "~nobody-here/view"], ["no home folder"]),
        (["LOG", "--epochs", "0"], ["epochs"]),
        (["LOG", "--dtype", "int8"], ["dtype must be one of float32, bfloat16"]),
        (["LOG", "--epochs", "nan"], ["epochs must be a finite number, not nan"]),
        (["LOG", "--learning-rate", "inf"], ["learning_rate must be a finite number"]),
        (["LOG", "-n", "0"], ["--max-new-tokens"]),
        (["missing.jsonl"], ["there is no log missing.jsonl"]),
    ],
)
def test_wrong_use_is_refused_before_anything_is_loaded(
    arguments: list[str], words: list[str], cli: Cli, log: str, tmp_path: Path
) -> None:
    given = [log if argument == "LOG" else argument for argument in arguments]
    assert_refused(cli("adapt", *given, "--view", str(tmp_path / "view")), *words)
    assert not (tmp_path / "view").exists()


def test_a_view_that_was_set_aside_and_not_replaced_is_no_reason_to_start_afresh(
    cli: Cli, log: str, options: list[str], tmp_path: Path
) -> None:
    """What a kill between the two renames of a replacement leaves."""
    view = tmp_path / "view"
    (tmp_path / "init").rename(tmp_path / "view.before-1")
    assert_refused(cli("adapt", log, "--view", str(view)), "view.before-1 lies beside it", "--rollback")
    assert cli("adapt", "--rollback", "--view", str(view)).code == 0
    assert view.is_dir()


def test_the_view_is_named_by_where_it_lies_and_must_be_whole(
    cli: Cli, log: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, 9.0)
    view = tmp_path / "view"
    view.mkdir()
    monkeypatch.chdir(view)
    here = [*options, "--view", "."]
    assert_refused(cli("adapt", log, *here), f"{view} holds no view", "view_config.json is missing")
    assert_refused(cli("adapt", log, *options, "--view", "/"), "/ cannot be replaced by a view")
    assert_refused(cli("adapt", log, *options, "--view", "~nobody-here/view"), "no home folder")
    for file in (tmp_path / "init").iterdir():
        (view / file.name).write_bytes(file.read_bytes())
    assert "not kept, and nothing was changed" in cli("adapt", log, *here).out
    (view / "view.safetensors").unlink()
    assert_refused(cli("adapt", log, *here), f"{view} holds no view", "view.safetensors is missing")


def test_two_runs_never_replace_one_view(cli: Cli, log: str, options: list[str], tmp_path: Path) -> None:
    view = tmp_path / "view"
    with locked_file(view, "adapts"):
        assert_refused(cli("adapt", log, *options), f"adapts {view}")
        assert_refused(cli("adapt", "--rollback", "--view", str(view)), f"adapts {view}")
        assert not list(tmp_path.glob("view.adapt-*"))
    assert not view.exists()
