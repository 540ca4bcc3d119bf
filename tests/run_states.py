"""Saved states of training runs, read without torch.distributed.checkpoint: the slow oracle of its reader."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from orthrus.training.state_folder import STATE, STATE_FILE


def state(run: Path) -> dict[str, Any]:
    """What `state.json` holds, its tensors whole under `view`, `mean` and `optimizer` (there by name, then kind)."""
    content: dict[str, Any] = json.loads((run / STATE / STATE_FILE).read_text())
    try:
        tensors = whole_tensors(run / STATE / content["folder"], content["files"])
    except FileNotFoundError:
        # A run that goes on has replaced it meanwhile; what was not replaced is damaged.
        assert json.loads((run / STATE / STATE_FILE).read_text()) != content
        return state(run)
    optimizer: dict[str, dict[str, Any]] = {
        name: {"step": count} for name, count in content["updates"].items()
    }
    view, mean = {}, {}
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        if kind == "view":
            view[name] = tensor
        elif kind == "mean":
            mean[name] = tensor
        else:
            optimizer[name][kind] = tensor
    return content | {"view": view, "mean": mean, "optimizer": optimizer}


def whole_tensors(folder: Path, files: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Each tensor from its parts, every element of it written exactly once."""
    parts: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            where = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for key in file.keys():  # noqa: SIM118
                parts.setdefault(key, []).append((where[key]["saved_offsets"], file.get_tensor(key)))
    return {key: _whole(found) for key, found in parts.items()}


def _whole(parts: list[tuple[list[int], torch.Tensor]]) -> torch.Tensor:
    shape = [max(at[d] + part.shape[d] for at, part in parts) for d in range(parts[0][1].dim())]
    tensor, written = torch.zeros(shape, dtype=parts[0][1].dtype), torch.zeros(shape, dtype=torch.int)
    for at, part in parts:
        place = tuple(slice(a, a + n) for a, n in zip(at, part.shape, strict=True))
        tensor[place] = part
        written[place] += 1
    assert (written == 1).all()
    return tensor


def state_bytes(run: Path) -> dict[str, bytes]:
    """Every file of a saved state."""
    folder = run / STATE
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
