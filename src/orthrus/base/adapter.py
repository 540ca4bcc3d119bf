"""PEFT adapters in a folder of their own (LoRA and its kin): they become part of their base's weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from orthrus.base.hub import ADAPTER_FILE
from orthrus.base.json_text import parse_json
from orthrus.base.loading import Base
from orthrus.base.quiet import quiet_libraries
from orthrus.base.resolve import Source
from orthrus.base.text import printable
from orthrus.base.weights import check_finite
from orthrus.errors import CorruptFileError, MissingExtraError, UnsupportedModelError, UserInputError


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file()


def adapter_base(folder: Path) -> str:
    """The name of the base that an adapter was trained on; CorruptFileError when its config has none."""
    file = folder / ADAPTER_FILE
    try:
        name = parse_json(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{file} is no readable adapter config: fetch the adapter again.") from error
    if not isinstance(name, str) or not name.strip():
        raise CorruptFileError(
            f"{file} names no base model: write the base's folder or hub id as base_model_name_or_path."
        )
    return name


def with_adapter(base: Base, folder: Path) -> Base:
    """The base with the adapter of a folder merged into its weights.

    Raises MissingExtraError without peft, UserInputError for a quantised base, UnsupportedModelError for an
    adapter that cannot be merged, CorruptFileError for one that does not fit or whose weights are not finite.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError(
            f"{folder.name} is a PEFT adapter, which needs one more package; run `pip install peft`."
        ) from error
    name = printable(folder.name)
    if base.quantised is not None and base.source.kind != "gguf":
        raise UserInputError(
            f"{name} cannot be merged into {base.name}, which is quantised ({base.quantised}): merge it into "
            "the unquantised model and save that."
        )
    try:
        with quiet_libraries():
            adapted: Any = PeftModel.from_pretrained(base.model, folder)
            model = adapted.merge_and_unload() if hasattr(adapted, "merge_and_unload") else None
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160].rstrip(".:")
        raise CorruptFileError(
            f"the adapter {name} does not load onto {base.name} ({reason}): use it with the base that it was "
            "trained on."
        ) from error
    if model is None:
        raise UnsupportedModelError(
            f"the adapter {name} cannot be merged into weights, as prompt tuning cannot: use a LoRA."
        )
    check_finite(model, {}, name)
    model.requires_grad_(False)
    model.eval()
    return replace(base, name=name, model=model, source=Source("folder", str(folder), folder))
