"""Views on disk: a small folder of their own, like an adapter, beside a base that is stored elsewhere."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from orthrus.base.fingerprint import fingerprint
from orthrus.base.loading import Base
from orthrus.base.outputs import atomic_folder
from orthrus.errors import CheckpointError, CorruptFileError, OrthrusWarning
from orthrus.model.card import view_card
from orthrus.model.dual_view import DualView
from orthrus.model.names import is_view_tensor, to_file
from orthrus.model.view_config import ViewConfig

CONFIG_FILE = "view_config.json"
WEIGHTS_FILE = "view.safetensors"
MODEL_TYPE = "orthrus"
ARCHITECTURE = "OrthrusForCausalLM"
DEFAULT_FRESH_BLOCK_SIZE = 8


def fresh_view(base: Base, block_size: int = DEFAULT_FRESH_BLOCK_SIZE) -> DualView:
    """A view whose twins are copies of the AR ones: lossless at once, fast only after training.

    The mask is the first embedding row that no token uses, or a mask embedding of its own where the
    vocabulary has none to spare.
    """
    num_rows = base.model.get_input_embeddings().weight.shape[0]
    spare = len(base.tokenizer) if base.tokenizer is not None else num_rows
    config = ViewConfig(
        block_size=block_size,
        mask_token_id=spare if spare < num_rows else None,
        base_name=base.reference,
        base_fingerprint=fingerprint(base.model),
    )
    return DualView(base.model, base.family, config)


def view_tensors(dual: DualView) -> dict[str, Tensor]:
    """The view's tensors under their file names, on the CPU."""
    return {to_file(name): p.detach().cpu().contiguous() for name, p in dual.view_parameters().items()}


def save_view(dual: DualView, folder: Path | str) -> None:
    """Write `view.safetensors`, `view_config.json` and a card; refuses to overwrite, never half-written."""
    with atomic_folder(Path(folder)) as temporary:
        save_file(view_tensors(dual), temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(temporary / CONFIG_FILE, dual.config.to_dict())
        # So that AutoModelForCausalLM knows whose folder it is; without the base's config: that is a merged one's.
        write_json(temporary / "config.json", {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]})
        (temporary / "README.md").write_text(view_card(dual), encoding="utf-8")


def load_view(base: Base, folder: Path | str) -> DualView:
    """Put the view of a folder on `base`.

    Raises CheckpointError when files are missing or the view has the shapes of another base; warns with
    both fingerprints when the shapes fit but the base's weights are not those that it was trained on.
    """
    folder = Path(folder)
    config = ViewConfig.from_dict(read_json(folder / CONFIG_FILE))
    found = fingerprint(base.model)
    if config.base_fingerprint and config.base_fingerprint != found:
        warnings.warn(
            f"the view was trained on {config.base_name} ({config.base_fingerprint}), but this base is {base.name} "
            f"({found}): the output stays lossless, the drafts may be worth less.",
            OrthrusWarning,
            stacklevel=2,
        )
    tensors = read_view_tensors([folder / WEIGHTS_FILE])
    dual = DualView(base.model, base.family, config)
    assign_view(dual, tensors, where=str(folder))
    return dual


def assign_view(dual: DualView, tensors: dict[str, Tensor], *, where: str) -> None:
    """Copy file-named tensors into the twins; CheckpointError names the first that is missing or misfits."""
    wanted = {to_file(name): parameter for name, parameter in dual.view_parameters().items()}
    for kind, names in (("lacks", wanted.keys() - tensors.keys()), ("has unknown", tensors.keys() - wanted.keys())):
        if names:
            raise CheckpointError(
                f"the view in {where} {kind} {len(names)} tensors, {min(names)} first: it belongs to another base model "
                "or family; load it with the base that its view_config.json names."
            )
    with torch.no_grad():
        for name, parameter in wanted.items():
            if tensors[name].shape != parameter.shape:
                raise CheckpointError(
                    f"the view in {where} does not fit this base: {name} has shape {tuple(tensors[name].shape)}, "
                    f"the base needs {tuple(parameter.shape)}; load it with the base that it was trained on."
                )
            parameter.copy_(tensors[name])


def read_view_tensors(files: list[Path]) -> dict[str, Tensor]:
    """The view's tensors in safetensors files, base tensors left unread."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file.name} is missing in {file.parent}; copy the whole view folder.")
        try:
            with safe_open(file, framework="pt") as f:
                tensors |= {name: f.get_tensor(name) for name in f.keys() if is_view_tensor(name)}  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise CorruptFileError(f"{file} cannot be read ({e}); copy or download it again.") from e
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError when missing, CorruptFileError when it is not JSON."""
    if not file.is_file():
        raise CheckpointError(f"there is no {file.name} in {file.parent}; name a folder that holds a view.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CorruptFileError(f"{file} is not valid JSON ({e}); copy or download it again.") from e
    if not isinstance(content, dict):
        raise CorruptFileError(f"{file} is not a JSON object; copy or download it again.")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
