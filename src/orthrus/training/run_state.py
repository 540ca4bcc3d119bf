"""Reads the saved state of a training run: all that an exact resume needs, checked before it is used."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from orthrus.base.json_text import parse_json
from orthrus.base.outputs import check_writable
from orthrus.base.storage import sha256_file
from orthrus.errors import CorruptFileError, UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.view_config import is_chance
from orthrus.training.moving_mean import MovingMean
from orthrus.training.plan import kept_bytes
from orthrus.training.processes import Processes
from orthrus.training.recipe import TrainConfig, to_plain
from orthrus.training.run_folder import BEST, LAST
from orthrus.training.state_folder import is_shard_name, is_shards_name, state_file

KIND = "orthrus-state"
# Settings that may change between the parts of a run without changing what it computes.
_FREE = {
    "save_every",
    "evaluate_every",
    "evaluate_prompts",
    "log_every",
    "output",
    "corpus",
    "micro_batch_size",
    "sharding",
    "trackers",
    "attention",
    "activations",
}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MEAN = "mean"


@dataclass(slots=True)
class RunState:
    """Steps done, evaluation scores as (step, tokens per cycle), and `ViewConfig.goes_on` of the last evaluation."""

    step: int = 0
    scores: list[tuple[int, float]] = field(default_factory=list)
    goes_on: float | None = None


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state on disk that fits the run. updates: for each trained parameter, the number of AdamW's updates."""

    run: RunState
    updates: dict[str, int]
    folder: Path
    digests: dict[str, str]

    def damaged(self, problem: str) -> CorruptFileError:
        """The error for a damaged state."""
        return _damaged(self.folder.parent, problem)


def state_tensors(
    dual: DualView, moments: Mapping[str, Mapping[str, Tensor]], mean: MovingMean
) -> dict[str, Tensor]:
    """All tensors of a state, under their names in its shards."""
    tensors: dict[str, Tensor] = {f"view.{name}": p.detach() for name, p in dual.view_parameters().items()}
    for name, entry in moments.items():
        tensors |= {f"{key}.{name}": entry[key] for key in _MOMENTS}
    return tensors | {f"{_MEAN}.{name}": tensor for name, tensor in mean.tensors.items()}


def trained_parameters(dual: DualView) -> dict[str, torch.nn.Parameter]:
    """The parameters of the optimizer, in its order."""
    return {name: p for name, p in dual.view_parameters().items() if p.requires_grad}


def find_state(run: Path, dual: DualView, config: TrainConfig, corpus_digest: str) -> SavedState | None:
    """The state that is saved in a run's folder, without its tensors; None if there is none.

    Every process must call this, and gets the same result. Raises UserInputError if the recipe, the corpus or the base
    has changed, and CorruptFileError if the state is unreadable or incomplete.
    """
    file = state_file(run)
    if not file.is_file():
        return None
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as e:
        raise CorruptFileError(
            f"{file} cannot be read as the state of a run ({type(e).__name__}); move {file.parent} away to "
            "start again."
        ) from e
    if not (
        isinstance(content, dict)
        and content.get("kind") == KIND
        and isinstance(content.get("config"), dict)
        and {"corpus", "base"} <= content.keys()
    ):
        raise CorruptFileError(f"{file} is not the state of a run; move {file.parent} away to start again.")
    plain = to_plain(config)
    changed = sorted(k for k in plain if k not in _FREE and content["config"].get(k) != plain[k])
    if content["corpus"] != corpus_digest:
        changed.append("corpus content")
    if content["base"] != dual.config.base_fingerprint:
        changed.append("base weights")
    if changed:
        raise UserInputError(
            f"the run in {run} was begun with other settings ({', '.join(changed)}); resume it with its own "
            "recipe, or give another output folder."
        )
    problem = _content_problem(content, dual) or _files_problem(content, file.parent)
    if problem is None:
        problem = _tensors_problem(
            file.parent / content["folder"], dual, content["updates"], config.ema_decay
        )
    if problem is not None:
        raise _damaged(file.parent, problem)
    return SavedState(
        RunState(content["step"], [tuple(score) for score in content["scores"]], content.get("goes_on")),
        content["updates"],
        file.parent / content["folder"],
        {name: about["sha256"] for name, about in content["files"].items()},
    )


def load_state(
    saved: SavedState,
    dual: DualView,
    optimizer: torch.optim.Optimizer,
    mean: MovingMean,
    processes: Processes,
) -> RunState:
    """Load a saved state into the view, its optimizer and its mean. Each process loads the parts that it holds.

    All processes must call this. The number of processes and their sharding may differ from those of the save. Raises
    CorruptFileError, on all processes, if a shard is damaged or a weight is not finite.
    """
    mine = sorted(saved.digests.items())[processes.index :: processes.count]
    problem = processes.first_problem(_digest_problem(saved.folder, dict(mine)))
    if problem is not None:
        raise saved.damaged(problem)
    trained = trained_parameters(dual)
    moments = {
        name: {key: torch.zeros_like(trained[name], requires_grad=False) for key in _MOMENTS}
        for name in saved.updates
    }
    tensors = state_tensors(dual, moments, mean)
    reader = HuggingFaceStorageReader(str(saved.folder))
    try:
        load(
            dict(tensors),
            storage_reader=reader,
            process_group=processes.cpu_group,
            no_dist=processes.cpu_group is None,
        )
    except (Exception, CheckpointException) as e:
        raise saved.damaged(f"its tensors cannot be read: {type(e).__name__}") from e
    problem = processes.first_problem(_number_problem(state_tensors(dual, {}, mean)))
    if problem is not None:
        raise saved.damaged(problem)
    index = {name: at for at, name in enumerate(trained)}
    state = {
        index[name]: {"step": torch.tensor(float(saved.updates[name])), **entry}
        for name, entry in moments.items()
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return saved.run


def _damaged(folder: Path, problem: str) -> CorruptFileError:
    return CorruptFileError(
        f"the state in {folder} is damaged ({problem}); move that folder away to start again."
    )


def _content_problem(content: dict[str, Any], dual: DualView) -> str | None:
    """The first wrong entry of a state's JSON, or None."""
    step, scores, updates = content.get("step"), content.get("scores"), content.get("updates")
    if not _is_count(step):
        return "step is no count"
    goes_on = content.get("goes_on")
    if goes_on is not None and not is_chance(goes_on):
        return "goes_on is no chance"
    if not isinstance(scores, list) or not all(map(_is_score, scores)):
        return "scores are no pairs of a step and a number"
    if (
        not isinstance(updates, dict)
        or not updates.keys() <= trained_parameters(dual).keys()
        or not all(map(_is_count, updates.values()))
    ):
        return "the optimizer's state is of other parameters"
    files = content.get("files")
    if (
        not is_shards_name(content.get("folder"))
        or not isinstance(files, dict)
        or not all(map(is_shard_name, files))
        or not all(
            isinstance(about, dict) and about.keys() == {"bytes", "sha256"} for about in files.values()
        )
    ):
        return "its list of shards is none"
    return None


def _files_problem(content: dict[str, Any], folder: Path) -> str | None:
    """The first shard that differs from the list, or None."""
    shards = folder / content["folder"]
    found = {file.name for file in shards.glob("*")}
    for name, about in sorted(content["files"].items()):
        if name not in found:
            return f"{content['folder']}/{name} is missing"
        if (size := (shards / name).stat().st_size) != about["bytes"]:
            return f"{content['folder']}/{name} has {size} bytes in place of {about['bytes']}"
    if strange := found - content["files"].keys():
        return f"{content['folder']}/{min(strange)} is none of its shards"
    return None


def _tensors_problem(shards: Path, dual: DualView, updates: dict[str, int], ema_decay: float) -> str | None:
    """The first header of the shards that does not fit the view, or None."""
    try:
        found = HuggingFaceStorageReader(str(shards)).read_metadata().state_dict_metadata
    except Exception as e:
        return f"its shards cannot be read: {type(e).__name__}"
    parameters = dual.view_parameters()
    wanted = {f"view.{name}": parameter for name, parameter in parameters.items()}
    wanted |= {f"{key}.{name}": parameters[name] for name in updates for key in _MOMENTS}
    if ema_decay:
        wanted |= {f"{_MEAN}.{name}": parameter for name, parameter in trained_parameters(dual).items()}
    if found.keys() != wanted.keys():
        return "it holds the tensors of another view"
    for name, parameter in wanted.items():
        about = found[name]
        if not isinstance(about, TensorStorageMetadata) or not _is_like(about, parameter):
            return f"{name} is not a tensor of finite numbers in its shape"
    return None


def _is_like(about: TensorStorageMetadata, parameter: Tensor) -> bool:
    """Whether the parts of a tensor form a tensor like the parameter."""
    return (
        about.size == parameter.shape
        and about.properties.dtype.is_floating_point
        and sum(math.prod(chunk.sizes) for chunk in about.chunks) == parameter.numel()
    )


def _digest_problem(folder: Path, digests: dict[str, str]) -> str | None:
    for name, digest in digests.items():
        try:
            found = sha256_file(folder / name)
        except OSError as e:
            return f"{folder.name}/{name} cannot be read: {type(e).__name__}"
        if found != digest:
            return f"{folder.name}/{name} was changed after it was written"
    return None


def _number_problem(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor whose part in this process holds a number that is not finite, or None."""
    for name, tensor in tensors.items():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not part.isfinite().all():
            return f"{name} is not a tensor of finite numbers in its shape"
    return None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_score(score: object) -> bool:
    return (
        isinstance(score, list)
        and len(score) == 2
        and type(score[0]) is int
        and isinstance(score[1], float)
        and math.isfinite(score[1])
    )


def check_room(run: Path, dual: DualView, config: TrainConfig) -> None:
    """Raises StorageError if the disk has no room for the state, two views, and the new copy during a replacement."""
    parameters = dual.view_parameters().values()
    view_bytes = 4 * sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    state_bytes = view_bytes + kept_bytes(averaged=bool(config.ema_decay)) * trained
    sizes = {state_file(run): state_bytes, run / BEST: view_bytes, run / LAST: view_bytes}
    missing = sum(size for place, size in sizes.items() if not place.exists())
    check_writable(run, missing + max(sizes.values()))
