"""Which code runs passes: the stock one, compiled on a CPU, or captured on a GPU."""

import os
import warnings

import torch

from orthrus.base.storage import Progress
from orthrus.engine.captured import CapturedRunner
from orthrus.engine.compiled import compile_passes, compile_problem, fits_twice
from orthrus.errors import OrthrusWarning, UserInputError
from orthrus.model.dual_view import DualView

RUNNERS = ("auto", "eager", "compiled", "captured")


def default_runner(runner: str | None) -> str:
    """The runner asked for: by name, else by the environment's ORTHRUS_RUNNER, else "auto"."""
    return runner or os.environ.get("ORTHRUS_RUNNER") or "auto"


def check_runner(runner: str) -> None:
    """UserInputError unless there is a runner of that name."""
    if runner not in RUNNERS:
        raise UserInputError(f"runner must be one of {', '.join(RUNNERS)}, not {runner!r}.")


def use_runner(dual: DualView, runner: str, on_progress: Progress | None = None) -> None:
    """Let passes run through the runner of that name from now on.

    "auto": compiled on a CPU that has a C++ compiler beside it and memory for packed weights, else eager.
    "compiled": see `engine.compiled`. "captured": see `engine.captured`; for CUDA devices. Raises
    UserInputError for an unknown runner, or one that cannot run here.
    """
    check_runner(runner)
    if runner == "captured":
        if dual.device.type != "cuda" or not torch.cuda.is_available():
            raise UserInputError(
                f"the captured runner is made for CUDA devices, and the model is on {dual.device.type}; use "
                "runner='auto'."
            )
        dual.accelerate("captured", passes=CapturedRunner(dual))
        return
    problem = None if runner == "eager" else compile_problem(dual)
    if runner == "eager" or (runner == "auto" and (problem is not None or not fits_twice(dual))):
        return
    if problem is not None:
        raise UserInputError(f"the compiled runner {problem}; use runner='eager'.")
    try:
        compile_passes(dual, on_progress)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        if runner == "compiled":
            raise UserInputError(f"compiling failed ({reason}): use runner='eager'.") from error
        warnings.warn(f"compiling failed ({reason}): running eagerly.", OrthrusWarning, stacklevel=2)
