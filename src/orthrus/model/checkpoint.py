"""View folders: small folders, like adapters, for a base that is stored elsewhere."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from orthrus.base.fingerprint import fingerprint
from orthrus.base.json_text import parse_json
from orthrus.base.loading import Base
from orthrus.base.outputs import atomic_folder
from orthrus.base.owned import replace_folder
from orthrus.base.quantised import is_quantised, plain_weight
from orthrus.base.weights import is_finite
from orthrus.errors import CheckpointError, CorruptFileError, OrthrusWarning, UserInputError
from orthrus.model.card import view_card
from orthrus.model.delta_codec import decode_tensors, encode_tensors
from orthrus.model.dual_view import DualView
from orthrus.model.names import ARCHITECTURE, MODEL_TYPE, is_view_tensor, to_file
from orthrus.model.twin import LowRankTwin, chosen_names, twins
from orthrus.model.view_config import Encoding, ViewConfig

CONFIG_FILE = "view_config.json"
WEIGHTS_FILE = "view.safetensors"
DEFAULT_FRESH_BLOCK_SIZE = 8
_KIND = (
    "layers",
    "twins",
    "rank",
    "rank_scale",
    "repair_rank",
    "mask_token_id",
    "base_fingerprint",
    "trained",
)


def untrained_view(
    base: Base,
    block_size: int = DEFAULT_FRESH_BLOCK_SIZE,
    layers: Sequence[int] | None = None,
    *,
    twins: Sequence[str] | None = None,
    rank: int | None = None,
    rank_scale: float = 1.0,
    mask: int | str = "auto",
    seed: int = 0,
) -> DualView:
    """A view that equals the AR view: it is lossless, but saves passes only after training.

    layers: indices of the layers that get twins. twins: the modules that get one (such as q_proj, k_proj and v_proj).
    None means all layers, and all of their attention. rank: of low-rank twins, drawn from `seed`; None for full copies.
    rank_scale: the factor on the low-rank part. mask: "auto" for the first embedding row that no token uses, or for a
    trained mask embedding if there is no such row; "trained" for the latter in any case; or the id of a row. Raises
    CheckpointError for a layer or twin that the base does not have, and UserInputError for such a mask.
    """
    config = ViewConfig(
        block_size=block_size,
        mask_token_id=_mask_token_id(base, mask),
        layers=None if layers is None else tuple(layers),
        twins=None if twins is None else chosen_names(base.family, twins),
        rank=rank,
        rank_scale=rank_scale,
        base_name=base.reference,
        base_fingerprint=fingerprint(base.model),
    )
    return DualView(base.model, base.family, config, seed=seed)


def _mask_token_id(base: Base, mask: int | str) -> int | None:
    num_rows: int = base.model.get_input_embeddings().weight.shape[0]  # type: ignore[assignment, index]
    if mask == "auto":
        spare = len(base.tokenizer)
        return spare if spare < num_rows else None
    if mask == "trained":
        return None
    if type(mask) is int and 0 <= mask < num_rows:
        return mask
    raise UserInputError(
        f"the mask must be auto, trained or the id of one of {base.name}'s {num_rows} embeddings, "
        f"not {mask!r}."
    )


def view_tensors(dual: DualView) -> dict[str, Tensor]:
    """The view's tensors under their file names, on the CPU."""
    return {to_file(name): p.detach().cpu().contiguous() for name, p in dual.view_parameters().items()}


def stored_tensors(dual: DualView, encoding: Encoding) -> dict[str, Tensor]:
    """The tensors of a view folder with that encoding, under their file names."""
    tensors = view_tensors(dual)
    return tensors if encoding == "full" else encode_tensors(tensors, _ar_tensors(dual))


def save_view(
    dual: DualView, folder: Path | str, encoding: Encoding = "full", *, owner: str | None = None
) -> None:
    """Write `view.safetensors`, `view_config.json` and a card, all or nothing.

    encoding: "full" keeps every bit; "delta4" stores 4-bit differences from the AR twins. With a base in float32, such
    a view does not change when it is encoded again. The folder must not exist, unless `owner` (a run's name) wrote it
    and nobody else has changed it since.
    """
    check_unquantised(dual)
    config = replace(dual.config, encoding=encoding)
    target = Path(folder)
    with atomic_folder(target) if owner is None else replace_folder(target, owner) as temporary:
        save_file(stored_tensors(dual, encoding), temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(temporary / CONFIG_FILE, config.to_dict())
        # It lets AutoModelForCausalLM recognise the folder. A base's config in it would make it a merged folder.
        write_json(temporary / "config.json", {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]})
        (temporary / "README.md").write_text(view_card(dual, encoding), encoding="utf-8")


def round_as_stored(dual: DualView, encoding: Encoding) -> None:
    """Round the view's weights to the values that they have after saving in that encoding and loading again."""
    if encoding != "full":
        twins_of = _ar_tensors(dual)
        assign_view(
            dual, decode_tensors(stored_tensors(dual, encoding), twins_of, where="memory"), where="memory"
        )


def check_unquantised(dual: DualView) -> None:
    """Raises CheckpointError if linear layers were quantised after loading, because their weights no longer exist."""
    precision = dual.precision or dual.draft_precision
    if precision is not None:
        raise CheckpointError(
            f"the model was loaded in {precision}, which keeps no weights to write: load it in another "
            "dtype, and without a draft dtype, to save it."
        )


def load_view(base: Base, folder: Path | str, *, dtype: torch.dtype | None = None) -> DualView:
    """Put the view of a folder on `base`. dtype: of the view's weights, by default the base's.

    Raises CheckpointError if files are missing, or if the view has the shapes of another base. Warns with both
    fingerprints if the shapes fit but the view was trained on other weights.
    """
    folder = Path(folder)
    config = ViewConfig.from_dict(read_json(folder / CONFIG_FILE))
    # The fingerprint is taken first, because twins change the names of the weights.
    found = fingerprint(base.model)
    # Loaded weights are never encoded, even if the folder's are.
    dual = DualView(base.model, base.family, replace(config, encoding="full"))
    if dtype is not None:
        for parameter in dual.view_parameters().values():
            parameter.data = parameter.data.to(dtype)
    assign_view(dual, _whole_tensors(dual, folder, config.encoding), where=str(folder))
    if config.base_fingerprint and config.base_fingerprint != found:
        kind = f", quantised as {base.quantised}" if base.quantised else ""
        warnings.warn(
            f"the view was trained on {config.base_name} ({config.base_fingerprint}), but this base is "
            f"{base.name} ({found}{kind}): the output stays lossless, the drafts may be worth less.",
            OrthrusWarning,
            stacklevel=2,
        )
    return dual


def _whole_tensors(dual: DualView, folder: Path, encoding: Encoding) -> dict[str, Tensor]:
    """A folder's decoded tensors, under file names. `dual` has the base that they belong to."""
    tensors = read_view_tensors([folder / WEIGHTS_FILE])
    if encoding == "delta4":
        tensors = decode_tensors(tensors, _ar_tensors(dual), where=str(folder))
    return tensors


def average_view(dual: DualView, folders: Sequence[Path]) -> None:
    """Give the view the mean of its own weights and of those in the folders, with equal weights.

    The mean of views of one run, or of runs that start from the same view, often drafts better than each of them. The
    view's own measurements are removed from its provenance, and the provenance of the others is added as `averaged`.
    Raises CheckpointError for a view of another kind or base, and what `load_view` raises.
    """
    own = dual.config
    total = {name: tensor.double() for name, tensor in view_tensors(dual).items()}
    made = []
    for folder in folders:
        config = ViewConfig.from_dict(read_json(folder / CONFIG_FILE))
        for name in _KIND:
            if getattr(config, name) != getattr(own, name):
                raise CheckpointError(
                    f"the view in {folder} has {name} {getattr(config, name)!r}, the other one {getattr(own, name)!r}: "
                    "only views of one kind and base have a mean."
                )
        tensors = _whole_tensors(dual, folder, config.encoding)
        # This checks names and shapes.
        assign_view(dual, tensors, where=str(folder))
        for name, tensor in tensors.items():
            total[name] += tensor.double()
        made.append(config.provenance)
    mean = {name: (tensor / (1 + len(folders))).float() for name, tensor in total.items()}
    assign_view(dual, mean, where="memory")
    provenance = {
        key: value for key, value in own.provenance.items() if key not in ("tokens_per_cycle", "figures")
    }
    dual.config = replace(own, goes_on=None, provenance=provenance | {"averaged": made})


def _ar_tensors(dual: DualView) -> dict[str, Tensor]:
    """The frozen AR tensors with the shape of their view tensor, under the view tensor's file name."""
    frozen = dict(dual.base.named_parameters())
    for path, twin in twins(dual.base).items():
        if is_quantised(twin.ar) and not isinstance(twin, LowRankTwin):
            frozen[f"{path}.ar.weight"] = plain_weight(twin.ar, dual.dtype)  # type: ignore[assignment]
    pairs = ((n, p, frozen.get(n.replace(".diffusion.", ".ar."))) for n, p in dual.view_parameters().items())
    return {
        to_file(name): ar.detach()
        for name, ours, ar in pairs
        if ar is not None and ar is not ours and ar.shape == ours.shape
    }


def assign_view(dual: DualView, tensors: dict[str, Tensor], *, where: str) -> None:
    """Copy tensors with file names into the twins. CheckpointError names the first missing or misshapen one."""
    wanted = {to_file(name): parameter for name, parameter in dual.view_parameters().items()}
    for kind, names in (
        ("lacks {} tensors", wanted.keys() - tensors.keys()),
        ("has {} tensors too many", tensors.keys() - wanted.keys()),
    ):
        if names:
            raise CheckpointError(
                f"the view in {where} {kind.format(len(names))}, {min(names)} first: it belongs to another "
                f"base model or family; load it with its own base ({dual.config.base_name})."
            )
    with torch.no_grad():
        for name, parameter in wanted.items():
            if tensors[name].shape != parameter.shape:
                raise CheckpointError(
                    f"the view in {where} does not fit this base: {name} has shape "
                    f"{tuple(tensors[name].shape)}, the base needs {tuple(parameter.shape)}; load it "
                    "with the base that it was trained on."
                )
            parameter.copy_(tensors[name])
            if not is_finite(parameter):
                raise UserInputError(
                    f"{name} of the view in {where} overflows in "
                    f"{str(parameter.dtype).removeprefix('torch.')}: load it in float32 or bfloat16."
                )


def read_view_tensors(files: list[Path]) -> dict[str, Tensor]:
    """The view's tensors in safetensors files. Base tensors are not read. All numbers must be finite.

    Raises CheckpointError for a missing file, and CorruptFileError for one that is damaged or holds NaN or Inf.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file.name} is missing in {file.parent}; copy the whole view folder.")
        try:
            with safe_open(file, framework="pt") as f:
                found = {name: f.get_tensor(name) for name in f.keys() if is_view_tensor(name)}  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise CorruptFileError(f"{file} cannot be read ({e}); copy or download it again.") from e
        for name, tensor in found.items():
            if not is_finite(tensor):
                raise CorruptFileError(
                    f"{name} in {file} holds a number that is not finite (NaN or Inf): copy or download it "
                    "again, or train the view anew."
                )
        tensors |= found
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError if the file is missing, CorruptFileError if it is no JSON object."""
    if not file.is_file():
        raise CheckpointError(f"there is no {file.name} in {file.parent}; {_which_has(file)}.")
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CorruptFileError(f"{file} is not valid JSON ({e}); copy or download it again.") from e
    if not isinstance(content, dict):
        raise CorruptFileError(f"{file} is not a JSON object; copy or download it again.")
    return content


def _which_has(file: Path) -> str:
    """Advice for the error: subfolders that have the file, as in the output of a training run."""
    inside = sorted(found.parent.name for found in file.parent.glob(f"*/{file.name}"))[:4]
    if not inside:
        return "name a folder that holds a view"
    return f"name the folder in it that has one: {' or '.join(inside)}"


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
