"""Which code runs passes: the stock one, compiled on a CPU, or captured on a GPU."""

import warnings

import torch

from orthrus.base.storage import Progress
from orthrus.engine.captured import CapturedRunner
from orthrus.engine.compiled import compile_passes, compile_problem, compiler_problem, memory_problem
from orthrus.errors import OrthrusError, OrthrusWarning, UserInputError
from orthrus.model.dual_view import DualView

RUNNERS = ("auto", "eager", "compiled", "captured")


def check_runner(runner: str) -> None:
    """UserInputError unless there is a runner of that name."""
    if runner not in RUNNERS:
        raise UserInputError(f"runner must be one of {', '.join(RUNNERS)}, not {runner!r}.")


def use_runner(dual: DualView, runner: str, on_progress: Progress | None = None) -> None:
    """Let passes run through the runner of that name from now on.

    "auto": compiled on an x86-64 Linux CPU, else eager; an OrthrusWarning says so where the compiler, the
    memory or the disk for it is missing. "compiled": see `engine.compiled`. "captured": see
    `engine.captured`; for CUDA devices.

    Raises UserInputError for an unknown runner, or one that cannot run here; StorageError where the cache
    folder cannot keep compiled code.
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
    if runner == "eager":
        dual.accelerate("eager")
        return
    problem = compile_problem(dual)
    if runner == "auto" and problem is not None:
        dual.accelerate("eager")
        return
    problem = problem or compiler_problem()
    if runner == "compiled" and problem is not None:
        raise UserInputError(f"the compiled runner {problem}; or use runner='eager'.")
    if runner == "auto" and (missing := problem or memory_problem(dual)) is not None:
        dual.accelerate("eager")
        warnings.warn(
            f"running eagerly, which is slower: the compiled runner {missing}.", OrthrusWarning, stacklevel=2
        )
        return
    try:
        compile_passes(dual, on_progress)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not isinstance(error, OrthrusError):
            reason = reason[:160]
        if runner == "auto":
            warnings.warn(
                f"compiling failed ({reason.rstrip('.')}): running eagerly.", OrthrusWarning, stacklevel=2
            )
            return
        if isinstance(error, OrthrusError):
            raise
        raise UserInputError(f"compiling failed ({reason}): use runner='eager'.") from error
