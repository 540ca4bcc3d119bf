"""Base and view in one folder: our merged layout for any family, and that of the released Orthrus-Qwen3 models.

Merged: config.json of type `orthrus` contains the base's own config. The base's files are as its family writes them,
and the view folder's files lie beside them. Released: architecture `OrthrusLM` on a stock Qwen3 config with
`block_size` and `mask_token_id`, all tensors in one set, twins named `*_diff`.
"""

from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from orthrus.base.fingerprint import fingerprint
from orthrus.base.loading import Base
from orthrus.base.outputs import atomic_folder
from orthrus.base.quantised import quantisation
from orthrus.base.weights import INDEX_FILE, weight_files
from orthrus.errors import CheckpointError
from orthrus.model.card import view_card
from orthrus.model.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    assign_view,
    check_unquantised,
    read_json,
    read_view_tensors,
    view_tensors,
    write_json,
)
from orthrus.model.dual_view import DualView
from orthrus.model.names import ARCHITECTURE, MODEL_TYPE
from orthrus.model.view_config import ViewConfig

RELEASED_ARCHITECTURE = "OrthrusLM"

FolderKind = Literal["base", "view", "merged", "released"]
MergedLayout = Literal["merged", "released"]


def folder_kind(folder: Path) -> FolderKind:
    """The kind of a local folder. The architecture shows a released checkpoint, whose model type is `qwen3`."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if RELEASED_ARCHITECTURE in (config.get("architectures") or ()):
        return "released"
    if config.get("model_type") == MODEL_TYPE and "base_config" in config:
        return "merged"
    return "view" if (folder / CONFIG_FILE).is_file() else "base"


def released_view_config(config: PreTrainedConfig, base_name: str, base_fingerprint: str = "") -> ViewConfig:
    """View settings of a released checkpoint. Raises CheckpointError if its config lacks them."""
    missing = [key for key in ("block_size", "mask_token_id") if getattr(config, key, None) is None]
    if missing:
        raise CheckpointError(
            f"{base_name} is an {RELEASED_ARCHITECTURE} checkpoint whose config.json lacks "
            f"{' and '.join(missing)}; download its config.json again."
        )
    return ViewConfig(
        block_size=int(config.block_size),
        mask_token_id=int(config.mask_token_id),
        base_name=base_name,
        base_fingerprint=base_fingerprint,
        trained=True,
        provenance={"layout": RELEASED_ARCHITECTURE},
    )


def load_released(base: Base, folder: Path) -> DualView:
    """The view of a released checkpoint, whose base is loaded already."""
    config = released_view_config(base.model.config, base.reference, fingerprint(base.model))
    dual = DualView(base.model, base.family, config)
    assign_view(dual, read_view_tensors(weight_files(folder)), where=str(folder))
    return dual


def save_merged(
    dual: DualView,
    base: Base | None,
    folder: Path | str,
    layout: MergedLayout = "merged",
    *,
    max_shard_size: int | str | None = None,
) -> None:
    """Write base and view into one new folder, with the tokenizer if `base` is given.

    max_shard_size: size limit of a file of the base's weights, as in transformers. Raises CheckpointError if the layout
    cannot hold them, and for a quantised base.
    """
    check_unquantised(dual)
    if (method := quantisation(dual.base.config)) is not None:
        raise CheckpointError(
            f"the base is quantised ({method}), and only ordinary weights can be written again: save the "
            "view alone, and load it with this base."
        )
    if layout == "released":
        _check_released(dual)
    with atomic_folder(Path(folder)) as temporary:
        sizes: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        dual.stock().save_pretrained(temporary, **sizes)
        if base is not None:
            base.tokenizer.save_pretrained(temporary)
        config = read_json(temporary / "config.json")
        if layout == "merged":
            write_json(temporary / "config.json", orthrus_config(config))
            write_json(temporary / CONFIG_FILE, dual.config.to_dict())
            save_file(view_tensors(dual), temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        else:
            extra = {
                "architectures": [RELEASED_ARCHITECTURE],
                "block_size": dual.config.block_size,
                "mask_token_id": dual.config.mask_token_id,
            }
            write_json(temporary / "config.json", config | extra)
            add_shard(temporary, view_tensors(dual))
        (temporary / "README.md").write_text(view_card(dual, folder=layout), encoding="utf-8")


def orthrus_config(base_config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a merged folder, which contains the base's own config."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "base_config": base_config,
        "vocab_size": base_config.get("vocab_size"),
        "dtype": base_config.get("dtype"),
    }


def _check_released(dual: DualView) -> None:
    config = dual.config
    problem = None
    if dual.family.name != "Qwen3":
        problem = f"it is for Qwen3 only, and this is {dual.family.name}"
    elif config.mask_token_id is None:
        problem = "it has no place for a trained mask embedding"
    elif config.layers is not None:
        problem = "it wants twins in every layer"
    elif config.twins is not None and set(config.twins) != set(dual.family.twin_names):
        problem = f"it wants twins of {', '.join(dual.family.twin_names)}"
    elif config.rank is not None:
        problem = "it has no place for low-rank twins"
    elif config.repair_rank is not None:
        problem = "it has no place for a repair head"
    if problem:
        raise CheckpointError(
            f"the released layout cannot hold this view: {problem}; write a merged folder instead."
        )


def add_shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Add the view's tensors as one more shard to those of the base, and write an index of all."""
    files = weight_files(folder)
    num_shards = len(files) + 1
    weight_map: dict[str, str] = {}
    for i, file in enumerate(files):
        name = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        weight_map |= dict.fromkeys(_tensor_names(file), name)
        file.rename(folder / name)
    last = f"model-{num_shards:05d}-of-{num_shards:05d}.safetensors"
    save_file(tensors, folder / last, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(tensors, last)
    total = sum(f.stat().st_size for f in folder.glob("model-*"))
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensor_names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as f:
        return list(f.keys())
