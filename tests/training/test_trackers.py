"""Trackers against stand-ins for their libraries: what is sent, under which name, and what is missing."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orthrus.errors import MissingExtraError, UserInputError
from orthrus.training.recipe import TrainConfig
from orthrus.training.trackers import open_trackers, wanted
from orthrus.training.trainer import TrainLog

LOG = TrainLog(
    step=20,
    num_steps=40,
    loss=1.5,
    accuracy_J=(0.75, 0.5),
    expected_tokens=2.125,
    learning_rate=1e-3,
    grad_norm=0.5,
    tokens_per_second=100.0,
    seconds_left=9.0,
    flops_per_second=1.5e11,
)


class Writer:
    """TensorBoard's writer."""

    def __init__(self, log_dir: str, **options: Any) -> None:
        self.options = {"log_dir": log_dir} | options
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False

    def add_scalar(self, name: str, value: float, global_step: int) -> None:
        self.scalars.append((name, value, global_step))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class OnlineRun:
    """What `wandb.init` and `trackio.init` return."""

    def __init__(self, **options: Any) -> None:
        print("greetings on stdout")
        self.options, self.closed = options, False
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.closed = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """All three libraries, and what is made of them."""
    found: dict[str, list[Any]] = {"tensorboard": [], "trackio": [], "wandb": []}

    def stand_in(name: str, attribute: str, kind: type) -> None:
        module = ModuleType(name)

        def make(*args: Any, **options: Any) -> Any:
            found[name.rpartition(".")[2]].append(kind(*args, **options))
            return found[name.rpartition(".")[2]][-1]

        setattr(module, attribute, make)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            monkeypatch.setattr(sys.modules["torch.utils"], "tensorboard", module, raising=False)

    stand_in("torch.utils.tensorboard", "SummaryWriter", Writer)
    stand_in("trackio", "init", OnlineRun)
    stand_in("wandb", "init", OnlineRun)
    return found


def test_scalars_go_to_the_runs_folder(tmp_path: Path, made: dict[str, list[Any]]) -> None:
    tracker = open_trackers(None, tmp_path, step=10)
    tracker.log(LOG)
    tracker.score(20, 2.5)
    tracker.close()
    (writer,) = made["tensorboard"]
    assert writer.options == {"log_dir": str(tmp_path / "tensorboard"), "purge_step": 11}
    assert ("loss", 1.5, 20) in writer.scalars
    assert ("accuracy/position_2", 0.5, 20) in writer.scalars
    assert ("decoded_tokens_per_cycle", 2.5, 20) in writer.scalars
    assert writer.closed
    assert not made["trackio"] + made["wandb"]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_run_goes_on_under_its_name(
    name: str, tmp_path: Path, made: dict[str, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (0, 20):
        tracker = open_trackers((name,), tmp_path, step)
        tracker.log(LOG)
        tracker.score(step, 2.5)
        tracker.close()
    # Stdout is for the report.
    assert capsys.readouterr().out == ""
    first, second = made[name]
    known = json.loads((tmp_path / "run.json").read_text())["tracked_as"]
    assert first.options == second.options
    assert first.options["name"] == f"{tmp_path.name}-{known}"
    assert first.options["project"] == "orthrus"
    assert first.options["resume"] == "allow"
    if name == "wandb":
        assert first.options["id"] == known
    assert second.logged[0][0]["loss"] == 1.5
    assert second.logged == [(second.logged[0][0], 20), ({"decoded_tokens_per_cycle": 2.5}, 20)]
    assert second.closed
    # A run that begins again is another run.
    open_trackers((name,), tmp_path, 0).close()
    assert made[name][2].options["name"] != first.options["name"]


def test_several_at_once_and_none(tmp_path: Path, made: dict[str, list[Any]]) -> None:
    names = ("wandb", "tensorboard", "wandb")
    open_trackers(names, tmp_path, 0).log(LOG)
    assert [len(found) for found in made.values()] == [1, 0, 1]
    open_trackers((), tmp_path, 0).log(LOG)
    assert [len(found) for found in made.values()] == [1, 0, 1]


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=f"{name} is not installed; run `pip install"):
            wanted((name,))
    # Nobody asked for TensorBoard by name.
    open_trackers(None, tmp_path, step=0).log(LOG)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_does_not_start(
    tmp_path: Path, made: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_key(**_: Any) -> None:
        raise RuntimeError("no API key configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", no_key)
    with pytest.raises(UserInputError, match="wandb did not start"):
        open_trackers(("wandb",), tmp_path, 0)


@pytest.mark.parametrize("value", [("comet",), "wandb", (["wandb"],)])
def test_unknown_trackers_are_refused(value: Any) -> None:
    with pytest.raises(UserInputError, match="trackers must list some of tensorboard, trackio, wandb"):
        TrainConfig(trackers=value)
