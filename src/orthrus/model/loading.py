"""Loads a base with its view from the names that a user gives."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from orthrus.base import hub
from orthrus.base.adapter import adapter_base, is_adapter, with_adapter
from orthrus.base.devices import QUANTISED, pick_device
from orthrus.base.fingerprint import fingerprint
from orthrus.base.loading import Base, config_from, load_base
from orthrus.base.quantised import quantisation
from orthrus.base.resolve import Source, resolve
from orthrus.base.storage import Progress
from orthrus.errors import CheckpointError, OrthrusWarning, UserInputError
from orthrus.model.checkpoint import CONFIG_FILE, load_view, read_json, untrained_view
from orthrus.model.draft_vocab import limit_drafts, single_characters
from orthrus.model.dual_view import DualView
from orthrus.model.int8_linear import check_quantised
from orthrus.model.merged import FolderKind, folder_kind, load_released
from orthrus.model.names import is_view_tensor
from orthrus.model.quantise import quantise, quantise_drafts
from orthrus.model.view_config import ViewConfig

DEFAULT_VIEW = "default"
UNTRAINED_VIEW = "untrained"
DEFAULT_MODEL_VIEW = "smollm2-135m"


def load_dual(
    model: str | Path = "default",
    view: str | Path = DEFAULT_VIEW,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    draft_dtype: str | None = None,
    draft_vocab: int | None = None,
    attn_implementation: str | None = None,
    on_progress: Progress | None = None,
) -> tuple[Base, DualView]:
    """Load `model` and put `view` on it.

    model: "default", a hub id, a GGUF file, or a folder that holds a stock base, a view (its base is loaded too), a
    merged checkpoint, or one of the released Orthrus-Qwen3 layout. A folder with a PEFT adapter loads as its base with
    the adapter merged in. view: "default" is the checkpoint's own view, or else the one shipped for the base, or else
    an untrained one with a warning. "untrained" is a copy of the base's own projections. Model and view may be a Path.

    dtype: as in `load_base`, or "int8" or "int4" (on a CPU), which quantise the linear layers after loading in float32.
    draft_dtype: "int8" or "int4" for block rows only; None for the dtype of all rows. draft_vocab: the number of most
    frequent ids that drafts may propose, None for all.

    Raises UserInputError for arguments of a wrong type, and what `load_base` and `load_view` raise.
    """
    model, view = _name("model", model), _name("view", view)
    for option, value in (("revision", revision), ("attn_implementation", attn_implementation)):
        if value is not None and not isinstance(value, str):
            raise UserInputError(f"{option} must be text or None, not {value!r}.")
    if on_progress is not None and not callable(on_progress):
        raise UserInputError("on_progress must be a function of (stage, done, total), or None.")
    if draft_vocab is not None and (type(draft_vocab) is not int or draft_vocab < 1):
        raise UserInputError(f"draft_vocab must be a whole number from 1, or None, not {draft_vocab!r}.")
    if draft_dtype not in (None, *QUANTISED):
        raise UserInputError(f"draft_dtype must be 'int8', 'int4' or left out, not {draft_dtype!r}.")
    quantised = [name for name in QUANTISED if name in (dtype, draft_dtype)]
    for name in quantised:
        check_quantised(name, torch.device(pick_device(device)))
    base, dual = _load(
        model,
        view,
        revision=revision,
        on_progress=on_progress,
        dtype="float32" if dtype in QUANTISED else dtype,
        device=device,
        attn_implementation=attn_implementation,
    )
    method = quantisation(base.model.config)
    if quantised and method is not None:
        raise UserInputError(f"{model} is quantised already ({method}): leave out {quantised[0]}.")
    if quantised and on_progress is not None:
        on_progress(f"quantising to {' and '.join(quantised)}", 0, None)
    # Drafts first, because they use the weights as they were loaded.
    if draft_dtype is not None and draft_dtype != dtype:
        quantise_drafts(dual, draft_dtype)
    if dtype in QUANTISED:
        quantise(dual, dtype)
    if draft_vocab is not None:
        limit_drafts(dual, draft_vocab, base.eos_token_ids | single_characters(base.tokenizer))
    return base, dual


def _name(option: str, value: str | Path) -> str:
    """The name of a model or a view, as text. Raises UserInputError if it is neither text nor a path."""
    if not isinstance(value, str | Path):
        raise UserInputError(f"{option} must be text or a path, not {value!r}.")
    return str(value)


def check_base_name(model: str) -> None:
    """Raises UserInputError if `model` is the folder of a view, where only a base is allowed."""
    folder = _folder_here(model)
    if folder is not None and folder_kind(folder) == "view":
        base_name = ViewConfig.from_dict(read_json(folder / CONFIG_FILE)).base_name
        raise UserInputError(
            f"{model} is a view of {base_name}, and no base: give {base_name} as the base, and the view as init_view "
            "where a view is to go on from it."
        )


class Frozen(NamedTuple):
    """A loaded base, and the folder that may also hold a view.

    folder: the folder that the name means, if it is one. kind: its content: a base, a view (of this base), a merged or
    a released checkpoint. on_default: the base is an adapter that was merged into the default model.
    """

    base: Base
    folder: Path | None
    kind: FolderKind
    on_default: bool


def load_frozen(
    model: str, *, revision: str | None = None, on_progress: Progress | None = None, **options: Any
) -> Frozen:
    """Load the base that `model` names, as in `load_dual`. options: of `load_base`. Raises what `load_base` raises."""
    return _frozen(_fetched(model, revision, on_progress), on_progress, **options)


def _frozen(source: Source, on_progress: Progress | None, **options: Any) -> Frozen:
    named, named_kind = _folder_of(source)
    folder, kind = named, named_kind
    if folder is not None and kind == "view":
        source = _fetched(ViewConfig.from_dict(read_json(folder / CONFIG_FILE)).base_name, None, on_progress)
        # The base may be a part of a merged or released folder.
        folder, kind = _folder_of(source)
    adapter = folder if folder is not None and is_adapter(folder) else None
    if adapter is not None:
        source = _fetched(adapter_base(adapter), None, on_progress)
        folder, kind = _folder_of(source)
    base = load_base(
        source,
        config=_nested_config(folder) if folder is not None and kind == "merged" else None,
        extra=is_view_tensor if kind == "released" else None,
        on_progress=on_progress,
        **options,
    )
    on_default = adapter is not None and base.source.kind == "default"
    if adapter is not None:
        base = with_adapter(base, adapter)
    if named_kind == "view":
        folder, kind = named, named_kind
    return Frozen(base, folder, kind, on_default)


def _load(
    model: str, view: str, *, revision: str | None, on_progress: Progress | None, **options: Any
) -> tuple[Base, DualView]:
    source = _fetched(model, revision, on_progress)
    if view != DEFAULT_VIEW and _folder_of(source)[1] == "view":
        raise UserInputError(f"{model} is a view already; name its base as the model, or leave out the view.")
    named = None if view in (DEFAULT_VIEW, UNTRAINED_VIEW) else _view_folder(view, on_progress)
    if named is not None:
        # Read it now, so that its errors come before a base is loaded.
        ViewConfig.from_dict(read_json(named / CONFIG_FILE))
    base, folder, kind, on_default = _frozen(source, on_progress, **options)
    if view == UNTRAINED_VIEW:
        return base, untrained_view(base)
    if named is not None:
        return base, load_view(base, named)
    if folder is not None and kind == "released":
        return base, load_released(base, folder)
    if folder is not None and kind in ("merged", "view"):
        return base, load_view(base, folder)
    return base, _shipped_view(base, on_default=on_default)


def _folder_of(source: Source) -> tuple[Path | None, FolderKind]:
    """The folder that holds a source, if it is one, and what is in it."""
    folder = source.path if source.kind in ("hub", "folder") else None
    return folder, "base" if folder is None else folder_kind(folder)


def _fetched(model: str, revision: str | None, on_progress: Progress | None) -> Source:
    """The source that `model` names. A hub id is downloaded, and has its folder as the path."""
    folder = _folder_here(model)
    if folder is not None and ((folder / CONFIG_FILE).is_file() or is_adapter(folder)) and revision is None:
        # The folder of a view or an adapter need not look like a model's.
        return Source("folder", model, folder)
    source = resolve(model, revision)
    if source.kind != "hub":
        return source
    return replace(source, path=hub.fetch(source.origin, source.revision, progress=on_progress))


def _folder_here(name: str) -> Path | None:
    """The local folder of that name; None for anything else, well-formed or not."""
    path = _path_here(name)
    return path if path is not None and path.is_dir() else None


def _path_here(name: str) -> Path | None:
    """The local folder or file of that name; None for anything else, well-formed or not."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (RuntimeError, OSError, ValueError):
        return None


def _nested_config(folder: Path) -> PreTrainedConfig:
    """The base's own config inside a merged folder's."""
    return config_from(read_json(folder / "config.json")["base_config"], folder.name)


def _view_folder(view: str, on_progress: Progress | None) -> Path:
    if (folder := _folder_here(view)) is not None:
        return folder
    if _path_here(view) is not None:
        raise CheckpointError(f"{view} is a file; name the folder of a view, which holds {CONFIG_FILE}.")
    source = resolve(view)
    if source.kind != "hub":
        raise CheckpointError(
            f"{view} is no view folder; name a folder that holds {CONFIG_FILE}, or a hub id."
        )
    return hub.fetch(source.origin, source.revision, progress=on_progress)


def _shipped_view(base: Base, *, on_default: bool = False) -> DualView:
    """The view that comes with Orthrus for this base, or else an untrained one with a warning.

    on_default: the base is an adapter merged into the default model, whose view still drafts for it.
    """
    if on_default or base.source.kind == "default":
        folder = shipped_view_folder(DEFAULT_MODEL_VIEW)
        if folder is not None and (base.source.kind != "default" or _fits(folder, base)):
            return load_view(base, folder)
    else:
        warnings.warn(
            f"there is no trained view for {base.name}: an untrained one is used, which is lossless but hardly "
            "drafts; name one as the view, or train it.",
            OrthrusWarning,
            stacklevel=3,
        )
    return untrained_view(base)


def shipped_view_folder(name: str) -> Path | None:
    """The folder of a view that comes with Orthrus: in the package, or in the checkout from which it runs."""
    package = Path(__file__).resolve().parents[1]
    places = [package / "_views" / name]
    # Only an editable install runs from src/. Otherwise the folder two levels up is not ours.
    if package.parent.name == "src":
        places.append(package.parents[1] / "views" / name)
    return next((place for place in places if (place / CONFIG_FILE).is_file()), None)


def _fits(folder: Path, base: Base) -> bool:
    """Whether the view was trained on exactly these weights. On others it would draft worse."""
    return ViewConfig.from_dict(read_json(folder / CONFIG_FILE)).base_fingerprint == fingerprint(base.model)
