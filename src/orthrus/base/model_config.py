"""The config of a base model alone: what is asked of it needs no weights."""

from typing import TYPE_CHECKING

from orthrus.base import default_model, gguf, hub
from orthrus.base.loading import read_config
from orthrus.base.resolve import resolve
from orthrus.base.storage import Progress
from orthrus.base.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def model_config(model: str, on_progress: Progress | None = None) -> "tuple[PreTrainedConfig, str]":
    """(config, name to show) of "default", a folder that need hold config.json alone, a GGUF file or a hub id.

    Of a hub id only the config is fetched; the default model and GGUF files are unpacked as if they were loaded.
    Raises as `load_base`.
    """
    source = resolve(model)
    if source.kind == "default":
        folder, name = default_model.ensure_folder(on_progress)[0], f"default ({default_model.NAME})"
    elif source.kind == "hub":
        folder, name = hub.fetch_config(source.origin, source.revision), source.origin
    else:
        assert source.path is not None, "what lies here has a path"
        folder = gguf.ensure_folder(source.path, on_progress) if source.kind == "gguf" else source.path
        name = printable(source.path.name or str(source.path))
    return read_config(folder, name), name
