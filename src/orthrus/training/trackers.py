"""Sends the metrics of a run to trackers, through accelerate's adapters."""

import sys
import uuid
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from orthrus.errors import MissingExtraError, UserInputError
from orthrus.training.run_folder import note_run, read_run
from orthrus.training.trainer import TrainLog

PROJECT = "orthrus"
# For each tracker, the module that it needs, and its name for pip.
_NEEDS = {
    "tensorboard": ("torch.utils.tensorboard", '"orthrus-lm[train]"'),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}


class Trackers:
    """Sends the values of `TrainLog` and evaluation scores to all trackers."""

    def __init__(self, trackers: list[GeneralTracker]) -> None:
        self._trackers = trackers

    def log(self, log: TrainLog) -> None:
        scalars = {
            "loss": log.loss,
            "expected_tokens_per_cycle": log.expected_tokens,
            "learning_rate": log.learning_rate,
            "gradient_norm": log.grad_norm,
            "diffusion_tokens_per_second": log.tokens_per_second,
        }
        scalars |= {f"accuracy/position_{j}": value for j, value in enumerate(log.accuracy_J, 1)}
        self._send(scalars, log.step)

    def score(self, step: int, tokens_per_cycle: float) -> None:
        self._send({"decoded_tokens_per_cycle": tokens_per_cycle}, step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def _send(self, scalars: dict[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(scalars, step=step)


def wanted(names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The trackers to open: those named, or for None TensorBoard if it is installed.

    Raises MissingExtraError for a named one that is not installed.
    """
    if names is None:
        return ("tensorboard",) if _installed("tensorboard") else ()
    for name in names:
        if not _installed(name):
            raise MissingExtraError(
                f"the tracker {name} is not installed; run `pip install {_NEEDS[name][1]}`, or leave it "
                "out of trackers."
            )
    return tuple(dict.fromkeys(names))


def open_trackers(names: tuple[str, ...] | None, folder: Path, step: int) -> Trackers:
    """Trackers of the run in `folder`, which continues after `step`. Call it in the main process only.

    TensorBoard removes values that an earlier part wrote after `step`. The others continue the run whose id that part
    stored in `folder`. Raises MissingExtraError as `wanted`, and UserInputError if one does not start.
    """
    opened = []
    for name in wanted(names):
        tracker = _tracker(name, folder, step)
        try:
            # Trackio prints to stdout, which is for reports.
            with redirect_stdout(sys.stderr):
                tracker.start()
        except Exception as e:
            raise UserInputError(
                f"the tracker {name} did not start ({type(e).__name__}: {e}); see to its own set-up, or "
                "leave it out of trackers."
            ) from e
        opened.append(tracker)
    return Trackers(opened)


def _tracker(name: str, folder: Path, step: int) -> GeneralTracker:
    if name == "tensorboard":
        return TensorBoardTracker("tensorboard", logging_dir=str(folder), purge_step=step + 1)
    run_id = _run_id(folder, step)
    title = f"{folder.resolve().name}-{run_id}"
    if name == "trackio":
        # Trackio identifies runs by name.
        return TrackioTracker(PROJECT, name=title, resume="allow")
    return WandBTracker(PROJECT, name=title, id=run_id, resume="allow", dir=str(folder))


def _run_id(folder: Path, step: int) -> str:
    """The run's id for trackers. It is stored in the run's folder, and new for a new run."""
    known = read_run(folder).get("tracked_as")
    if step and isinstance(known, str) and known:
        return known
    return str(note_run(folder, tracked_as=uuid.uuid4().hex[:8])["tracked_as"])


def _installed(name: str) -> bool:
    try:
        import_module(_NEEDS[name][0])
    except ImportError:
        return False
    return True
