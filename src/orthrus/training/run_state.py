"""Where a training run stands, on disk: everything that an exact resume needs, replaced in one step."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from orthrus.base.outputs import replace_file
from orthrus.errors import CorruptFileError, UserInputError
from orthrus.model.dual_view import DualView
from orthrus.training.processes import plain
from orthrus.training.recipe import TrainConfig, to_plain

STATE_FILE = "state.pt"
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
        "optimizer": tree_map_only(torch.Tensor, kept, optimizer.state_dict()),
        "config": to_plain(config),
        "corpus": corpus_digest,
        "base": dual.config.base_fingerprint,
    }
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # A process that was killed while it wrote could not clean up.
    for stale in folder.glob(f".{STATE_FILE}.*"):
        stale.unlink(missing_ok=True)
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
            f"{file} cannot be read ({type(e).__name__}); delete it to start again."
        ) from e
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
    with torch.no_grad():
        for name, parameter in dual.view_parameters().items():
            parameter.copy_(content["view"][name])
    return RunState(content["step"], [tuple(s) for s in content["scores"]], content["optimizer"])
