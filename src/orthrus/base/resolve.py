"""From what the user typed to where the model is: the built-in default, a folder, a GGUF file or a hub id."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orthrus.errors import ModelNotFoundError, UserInputError

SourceKind = Literal["default", "hub", "folder", "gguf"]

DEFAULT = "default"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a base model comes from.

    `origin` is what a report prints: the path, the hub id, or where the default was fetched from.
    `path` is the folder or file on this machine, None as long as nothing has been fetched.
    """

    kind: SourceKind
    origin: str
    path: Path | None = None
    revision: str | None = None


def resolve(model: str, revision: str | None = None) -> Source:
    """Decide what `model` names, without touching the network.

    Args:
        model: "default", a path to a folder or GGUF file, or a hub id `owner/name`.
        revision: branch, tag or commit of a hub id; an error with anything else.

    Raises:
        UserInputError: neither a path nor a well-formed hub id, or a revision that cannot apply.
        ModelNotFoundError: a path that does not exist, or a folder without a model in it.
    """
    source = _classify(model)
    if revision is None:
        return source
    if source.kind != "hub":
        raise UserInputError(f"A revision picks a version of a hub id, but '{model}' is none: leave it out.")
    if not revision.strip():
        raise UserInputError("The revision is empty: give a branch, a tag or a commit.")
    return Source("hub", source.origin, None, revision)


def is_hub_id(model: str) -> bool:
    """Whether the name is a well-formed hub id `owner/name`; a relative path of two parts looks the same."""
    return bool(_HUB_ID.fullmatch(model)) and not (
        ".." in model or "--" in model or model.endswith((".git", ".", "-"))
    )


def _classify(model: str) -> Source:
    if not model.strip():
        raise UserInputError("The model name is empty: give 'default', a folder, a .gguf file or a hub id.")
    if model == DEFAULT:
        return Source("default", DEFAULT)
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserInputError(f"'{model}' is no usable path ({error}): check the spelling.") from error
    if is_folder:
        return _folder(path)
    if is_file:
        return _file(path)
    if _looks_like_path(model):
        raise ModelNotFoundError(f"{model} does not exist: check the path, or give a hub id 'owner/name'.")
    if not is_hub_id(model):
        raise UserInputError(
            f"'{model}' is neither a folder or file here nor a hub id 'owner/name': check the spelling."
        )
    return Source("hub", model)


def _folder(path: Path) -> Source:
    if (path / "config.json").is_file():
        return Source("folder", str(path), path)
    gguf_files = sorted(path.glob("*.gguf"))
    if gguf_files:
        raise ModelNotFoundError(
            f"{path} has no config.json but holds GGUF files: name one, {gguf_files[0]}."
        )
    raise ModelNotFoundError(
        f"{path} has no config.json, so it is no model folder: give the folder that save_pretrained wrote."
    )


def _file(path: Path) -> Source:
    if path.suffix.lower() == ".gguf":
        return Source("gguf", str(path), path)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == _GGUF_MAGIC
    except OSError as error:
        raise ModelNotFoundError(
            f"{path} cannot be read ({error.strerror}): check its permissions."
        ) from error
    if is_gguf:
        return Source("gguf", str(path), path)
    raise UserInputError(f"{path} is a file but no GGUF model: give its folder, or a .gguf file.")


def _looks_like_path(model: str) -> bool:
    return (
        model.startswith(("/", "./", "../", "~"))
        or model in (".", "..")
        or model.endswith("/")
        or model.lower().endswith(".gguf")
        or "\\" in model
        or model.count("/") > 1
    )
