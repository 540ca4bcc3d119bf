"""Scalars of a run for TensorBoard, where it is installed."""

from importlib import import_module
from pathlib import Path
from typing import Any

from orthrus.training.trainer import TrainLog


class TensorBoard:
    """Writes what `TrainLog` reports, and the scores of real decodes, under a run's folder."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, log: TrainLog) -> None:
        scalars = {
            "loss": log.loss,
            "expected_tokens_per_cycle": log.expected_tokens,
            "learning_rate": log.learning_rate,
            "gradient_norm": log.grad_norm,
            "diffusion_tokens_per_second": log.tokens_per_second,
        }
        scalars |= {f"accuracy/position_{j}": value for j, value in enumerate(log.accuracy_J, 1)}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, log.step)

    def score(self, step: int, tokens_per_cycle: float) -> None:
        self._writer.add_scalar("decoded_tokens_per_cycle", tokens_per_cycle, step)

    def close(self) -> None:
        self._writer.close()


def open_tensorboard(folder: Path, step: int) -> TensorBoard | None:
    """A tracker that drops what an earlier part of the run wrote beyond `step`; None without TensorBoard."""
    try:
        module: Any = import_module("torch.utils.tensorboard")
    except ImportError:
        return None
    return TensorBoard(module.SummaryWriter(log_dir=str(folder), purge_step=step + 1))
