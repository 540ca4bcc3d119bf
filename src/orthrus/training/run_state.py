"""Where a training run stands, on disk: everything that an exact resume needs, replaced in one step."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from orthrus.base.outputs import check_writable, replace_file
from orthrus.errors import CorruptFileError, UserInputError
from orthrus.model.dual_view import DualView
from orthrus.training.processes import plain
from orthrus.training.recipe import TrainConfig, to_plain
from orthrus.training.run_folder import BEST, LAST, STATE_FILE

# Settings that may change between the parts of a run without changing what it computes.
_FREE = {
    "save_every",
    "evaluate_every",
    "evaluate_prompts",
    "log_every",
    "output",
    "corpus",
    "micro_rows",
    "sharding",
    "trackers",
    "attention",
    "activations",
}


@dataclass(slots=True)
class RunState:
    """Steps done, scores of the real decodes as (step, tokens per cycle), and the optimizer's state."""

    step: int = 0
    scores: list[tuple[int, float]] = field(default_factory=list)
    optimizer: dict[str, Any] | None = None


def save_state(
    folder: Path,
    dual: DualView,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    config: TrainConfig,
    corpus_digest: str,
    *,
    write: bool = True,
) -> None:
    """Write view, optimizer and position; a reader sees the old state or the new one, never a part.

    The file is the same whether the tensors are in shards or not. With shards all processes must call this,
    all but one with `write` false.
    """

    def kept(tensor: torch.Tensor) -> torch.Tensor | None:
        full = plain(tensor.detach())
        return full.cpu() if write else None

    content = {
        "step": state.step,
        "scores": state.scores,
        "view": {name: kept(p) for name, p in dual.view_parameters().items()},
        "optimizer": tree_map_only(torch.Tensor, kept, {"state": optimizer.state_dict()["state"]}),
        "config": to_plain(config),
        "corpus": corpus_digest,
        "base": dual.config.base_fingerprint,
    }
    if not write:
        return
    # Through a file of Python's: torch's own writer does not say that the disk is full.
    with replace_file(folder / STATE_FILE) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def load_state(folder: Path, dual: DualView, config: TrainConfig, corpus_digest: str) -> RunState | None:
    """Put a saved run's view into `dual` and return where it stood; None when there is none.

    Raises UserInputError when the recipe or the corpus is another, CorruptFileError when it is unreadable.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        return None
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:
        raise CorruptFileError(
            f"{file} cannot be read as the state of a run ({type(e).__name__}); move it away to start again."
        ) from e
    if not (isinstance(content, dict) and isinstance(content.get("config"), dict) and "corpus" in content):
        raise CorruptFileError(f"{file} is not the state of a run; move it away to start again.")
    plain = to_plain(config)
    changed = sorted(k for k in plain if k not in _FREE and content["config"].get(k) != plain[k])
    if content["corpus"] != corpus_digest:
        changed.append("corpus content")
    if content.get("base", dual.config.base_fingerprint) != dual.config.base_fingerprint:
        changed.append("base weights")
    if changed:
        raise UserInputError(
            f"the run in {folder} was begun with another {', '.join(changed)}; resume it with its own "
            "recipe, or give another output folder."
        )
    if (problem := _problem(content, dual)) is not None:
        raise CorruptFileError(f"{file} is damaged ({problem}); move it away to start again.")
    with torch.no_grad():
        for name, parameter in dual.view_parameters().items():
            parameter.copy_(content["view"][name])
    return RunState(content["step"], [tuple(s) for s in content["scores"]], content["optimizer"])


def _problem(content: dict[str, Any], dual: DualView) -> str | None:
    """What of a state read from disk is not as `save_state` writes it."""
    step, scores, view = content.get("step"), content.get("scores"), content.get("view")
    if type(step) is not int or not 0 <= step < 2**53:
        return "step is no count"
    if not isinstance(scores, list) or not all(map(_is_score, scores)):
        return "scores are no pairs of a step and a number"
    parameters = dual.view_parameters()
    if not isinstance(view, dict) or view.keys() != parameters.keys():
        return "it holds the tensors of another view"
    for name, parameter in parameters.items():
        if not _is_like(view[name], parameter) or not view[name].isfinite().all():
            return f"{name} is not a tensor of finite numbers in its shape"
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    if not _fits(content.get("optimizer"), trained):
        return "the optimizer's state is of other parameters"
    return None


def _is_score(score: object) -> bool:
    return (
        isinstance(score, list | tuple)
        and len(score) == 2
        and type(score[0]) is int
        and isinstance(score[1], float)
        and math.isfinite(score[1])
    )


def _is_like(value: object, parameter: torch.Tensor) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.shape == parameter.shape
        and value.is_floating_point()
    )


def _fits(optimizer: object, parameters: list[torch.nn.Parameter]) -> bool:
    """Whether this is a state of AdamW over these parameters."""
    entries = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(entries, dict):
        return False
    for index, entry in entries.items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(entry, dict):
            return False
        if entry.keys() != {"step", "exp_avg", "exp_avg_sq"} or not isinstance(entry["step"], torch.Tensor):
            return False
        if entry["step"].numel() != 1:
            return False
        if not all(_is_like(entry[key], parameters[index]) for key in ("exp_avg", "exp_avg_sq")):
            return False
    return True


def check_room(folder: Path, dual: DualView) -> None:
    """StorageError when the disk has no room for the state and two views, and for the new one of a pair."""
    parameters = dual.view_parameters().values()
    view_bytes = 4 * sum(p.numel() for p in parameters)
    sizes = {
        STATE_FILE: view_bytes + 8 * sum(p.numel() for p in parameters if p.requires_grad),
        BEST: view_bytes,
        LAST: view_bytes,
    }
    missing = sum(size for name, size in sizes.items() if not (folder / name).exists())
    check_writable(folder, missing + max(sizes.values()))
