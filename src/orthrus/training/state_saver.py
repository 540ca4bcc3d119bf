"""Saves a run's state during training: each process writes its shards, and the first one writes the list of them."""

import warnings
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from orthrus.base.json_text import parse_json
from orthrus.base.outputs import disk_problem, storage_errors
from orthrus.base.storage import sha256_file
from orthrus.errors import OrthrusError, OrthrusWarning, StorageError
from orthrus.model.dual_view import DualView
from orthrus.training.moving_mean import MovingMean
from orthrus.training.processes import Processes
from orthrus.training.recipe import TrainConfig, to_plain
from orthrus.training.run_state import KIND, RunState, state_tensors, trained_parameters
from orthrus.training.state_folder import STATE, drop_unnamed, place_state, shards_folder, state_file


class StateSaver:
    """Saves the state of a run in the background, one save at a time. As a context it waits for the last save.

    All processes must make the same calls. A save copies this process's part to the CPU before it returns. The next
    save, or the end of the context, raises a later error. Then the previous state is kept.
    """

    def __init__(
        self,
        run: Path,
        dual: DualView,
        optimizer: torch.optim.Optimizer,
        mean: MovingMean,
        config: TrainConfig,
        corpus_digest: str,
        processes: Processes,
    ) -> None:
        self._run, self._dual, self._optimizer, self._processes = run, dual, optimizer, processes
        self._mean = mean
        self._about = {
            "kind": KIND,
            "config": to_plain(config),
            "corpus": corpus_digest,
            "base": dual.config.base_fingerprint,
        }
        self._saving: Future[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except OrthrusError as problem:
            if error is None:
                raise
            warnings.warn(str(problem), OrthrusWarning, stacklevel=2)

    @property
    def failed(self) -> bool:
        """Whether a save has ended in an error that was not raised yet."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def save(self, state: RunState) -> None:
        """Begin to write the view, the optimizer, the mean and the step. Waits for the previous save.

        Raises StorageError if the previous save failed.
        """
        self.wait()
        held = {
            name: self._optimizer.state[parameter]
            for name, parameter in trained_parameters(self._dual).items()
            if parameter in self._optimizer.state
        }
        # One transfer from the device for all counts.
        counts = torch.stack([entry["step"] for entry in held.values()]).tolist() if held else []
        updates = {name: int(count) for name, count in zip(held, counts, strict=True)}
        facts = {"step": state.step, "updates": updates, **_plain_scores(state)}
        writer = _Writer(self._run, state.step, self._about | facts)
        index, count = self._processes.index, self._processes.count
        # Whole tensors are divided among the processes. Of sharded tensors, each process writes its own part.
        mine = {
            name: tensor.contiguous()
            for at, (name, tensor) in enumerate(state_tensors(self._dual, held, self._mean).items())
            if isinstance(tensor, DTensor) or at % count == index
        }
        group = self._processes.cpu_group
        saving = async_save(mine, storage_writer=writer, process_group=group, no_dist=group is None)
        assert isinstance(saving, Future), "the copy to the CPU was to end before the call"
        self._saving = saving

    def note_scores(self, state: RunState) -> None:
        """Write the evaluation scores into the last saved state, whose tensors stay. Waits for its save.

        Raises StorageError, on all processes, if that save failed or the disk is full.
        """
        self.wait()
        problem: str | None = None
        if self._processes.is_main:
            file = state_file(self._run)
            try:
                with storage_errors(file):
                    place_state(self._run, parse_json(file.read_bytes()) | _plain_scores(state))
            except (StorageError, OSError, ValueError) as error:
                problem = str(error)
        problem = self._processes.first_problem(problem)
        if problem is not None:
            raise StorageError(problem)

    def wait(self) -> None:
        """Wait for the save in progress. Raises StorageError if the last save failed."""
        if self._saving is None:
            return
        error = self._saving.exception()
        self._saving = None
        if error is None:
            return
        if self._processes.is_main:
            drop_unnamed(self._run)
        cause = _cause(error)
        if isinstance(cause, Exception) and (isinstance(cause, OrthrusError) or disk_problem(cause)):
            with storage_errors(self._run / STATE):
                raise cause
        raise StorageError(
            f"the state of the run in {self._run} was not saved ({type(cause).__name__}: {cause}); the one saved "
            "before it is kept: give the same command again."
        ) from cause


def _plain_scores(state: RunState) -> dict[str, Any]:
    return {"scores": [[at, float(score)] for at, score in state.scores], "goes_on": state.goes_on}


def _cause(error: BaseException) -> BaseException:
    """The error of the first process that had one."""
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


@dataclass(frozen=True, slots=True)
class _Shard:
    name: str
    num_bytes: int
    sha256: str


class _Writer(HuggingFaceStorageWriter):
    """Writes shards as safetensors, with their places in the headers, and at the end the run's `state.json`."""

    def __init__(self, run: Path, step: int, content: dict[str, Any]) -> None:
        super().__init__(str(shards_folder(run, step)), save_distributed=True)
        self._run, self._content = run, content

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        results = super().write_data(plan, planner).value()
        shards = {}
        for name in {result.storage_data.relative_path for result in results}:
            file = Path(self.path) / name
            shards[name] = _Shard(name, file.stat().st_size, sha256_file(file))
        written: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        written.set_result(
            [replace(result, storage_data=shards[result.storage_data.relative_path]) for result in results]
        )
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called only in the first process, after all have written."""
        shards = {result.storage_data for written in results for result in written}
        files = {
            shard.name: {"bytes": shard.num_bytes, "sha256": shard.sha256}
            for shard in sorted(shards, key=lambda shard: shard.name)
        }
        place_state(self._run, self._content | {"folder": Path(self.path).name, "files": files})
