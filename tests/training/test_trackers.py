"""The TensorBoard adapter, with and without TensorBoard."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orthrus.training.trackers import open_tensorboard
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
)


class Writer:
    made: "list[Writer]" = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        self.options, self.scalars, self.closed = options, [], False  # type: ignore[var-annotated]
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_scalars_go_to_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    tracker = open_tensorboard(tmp_path, step=10)
    assert tracker is not None
    tracker.log(LOG)
    tracker.score(20, 2.5)
    tracker.close()
    writer = Writer.made[-1]
    assert writer.options == {"log_dir": str(tmp_path), "purge_step": 11}
    assert ("loss", 1.5, 20) in writer.scalars
    assert ("accuracy/position_2", 0.5, 20) in writer.scalars
    assert ("decoded_tokens_per_cycle", 2.5, 20) in writer.scalars
    assert writer.closed


def test_without_tensorboard_there_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert open_tensorboard(tmp_path, step=0) is None
