"""Which code runs passes: compiled on a CPU, or the stock one."""

import os
import warnings

from orthrus.base.storage import Progress
from orthrus.engine.compiled import CompiledRunner, compile_problem, fits_twice
from orthrus.errors import OrthrusWarning, UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.runner import EagerRunner, Runner

RUNNERS = ("auto", "eager", "compiled")


def chosen_runner(runner: str | None) -> str:
    """The runner that is asked for: as given, else the environment's ORTHRUS_RUNNER, else "auto".

    UserInputError unless there is a runner of that name.
    """
    runner = runner or os.environ.get("ORTHRUS_RUNNER") or "auto"
    if runner not in RUNNERS:
        raise UserInputError(f"runner must be one of {', '.join(RUNNERS)}, not {runner!r}.")
    return runner


def make_runner(dual: DualView, runner: str = "auto", on_progress: Progress | None = None) -> Runner:
    """The runner of that name for a model.

    "auto": compiled where it can be, else eager, with an OrthrusWarning that says why where the model is on a
    CPU. Raises UserInputError for an unknown runner, or one that cannot run here.
    """
    runner = chosen_runner(runner)
    if runner == "eager":
        return EagerRunner(dual)
    problem = compile_problem(dual)
    if problem is None and runner == "auto" and not fits_twice(dual):
        problem = "needs as much memory again as the model takes, and there is less"
    if problem is None:
        try:
            return CompiledRunner(dual, on_progress)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            if runner == "compiled":
                raise UserInputError(f"compiling failed ({reason}): use runner='eager'.") from error
            problem = f"could not be made ({reason})"
    elif runner == "compiled":
        raise UserInputError(f"the compiled runner {problem}; use runner='eager'.")
    if dual.device.type == "cpu":
        warnings.warn(
            f"the compiled runner {problem}: passes run eagerly, several times slower.",
            OrthrusWarning,
            stacklevel=2,
        )
    return EagerRunner(dual)
