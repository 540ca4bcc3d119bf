"""Chooses the code that runs passes: compiled on a CPU, or the stock code."""

import os
import warnings

from orthrus.base.storage import Progress
from orthrus.engine.compiled import CompiledRunner, compile_problem, compiler_problem, memory_problem
from orthrus.errors import OrthrusError, OrthrusWarning, UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.runner import EagerRunner, Runner

RUNNERS = ("auto", "eager", "compiled")


def chosen_runner(runner: str | None) -> str:
    """The name of the requested runner: as given, otherwise the environment variable ORTHRUS_RUNNER, otherwise "auto".

    Raises UserInputError for an unknown name.
    """
    runner = runner or os.environ.get("ORTHRUS_RUNNER") or "auto"
    if runner not in RUNNERS:
        raise UserInputError(f"runner must be one of {', '.join(RUNNERS)}, not {runner!r}.")
    return runner


def make_runner(dual: DualView, runner: str = "auto", on_progress: Progress | None = None) -> Runner:
    """The runner of that name for a model.

    "auto": compiled on an x86-64 Linux CPU, otherwise eager. An OrthrusWarning says if it is eager because compiler,
    memory or disk are missing. Raises UserInputError for an unknown runner, or one that cannot run here. Raises
    StorageError if the cache folder cannot keep compiled code.
    """
    runner = chosen_runner(runner)
    if runner == "eager":
        return EagerRunner(dual)
    problem = compile_problem(dual)
    if runner == "auto" and problem is not None:
        return EagerRunner(dual)
    problem = problem or compiler_problem()
    if runner == "compiled" and problem is not None:
        raise UserInputError(f"the compiled runner {problem}; or use runner='eager'.")
    if runner == "auto" and (missing := problem or memory_problem(dual)) is not None:
        return _eager(dual, f"the compiled runner {missing}")
    try:
        return CompiledRunner(dual, on_progress)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not isinstance(error, OrthrusError):
            reason = reason[:160]
        if runner == "auto":
            return _eager(dual, f"compiling failed ({reason.rstrip('.')})")
        if isinstance(error, OrthrusError):
            raise
        raise UserInputError(f"compiling failed ({reason}): use runner='eager'.") from error


def _eager(dual: DualView, reason: str) -> Runner:
    warnings.warn(f"running eagerly, which is slower: {reason}.", OrthrusWarning, stacklevel=3)
    return EagerRunner(dual)
