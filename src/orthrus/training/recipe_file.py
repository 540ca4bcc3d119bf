"""Reads recipes: YAML with a key for each field of `TrainConfig`, and `key=value` settings that override it."""

import math
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from orthrus.errors import UserInputError
from orthrus.training.recipe import TrainConfig, shown

_KINDS = {str: "a text", int: "a whole number", bool: "true or false", float: "a number", tuple: "a list"}


def load_recipe(file: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a YAML recipe. `overrides` are `key=value` strings, which take precedence.

    Raises UserInputError for unknown keys (with a suggestion), wrong types and unreadable files.
    """
    import yaml

    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserInputError(
            f"the recipe {file} cannot be read ({getattr(e, 'strerror', None) or 'it is not UTF-8 text'}); "
            "those that come with Orthrus are in recipes/."
        ) from e
    try:
        content = yaml.safe_load(text)
    # YAML also raises ValueError for impossible dates and endless numbers, and RecursionError for deep nesting.
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserInputError(
            f"{file} is not valid YAML ({shown(e, str)}); compare it with recipes/smoke-cpu.yaml."
        ) from e
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserInputError(f"{file} must hold `key: value` lines; compare it with recipes/smoke-cpu.yaml.")
    for override in overrides or ():
        key, found, value = override.partition("=")
        if not found:
            raise UserInputError(f"an override must read key=value, not {shown(override)}.")
        _check_key(TrainConfig, key.strip(), where=f"the setting {shown(override)}")
        try:
            content[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as e:
            raise UserInputError(
                f"the value in {shown(override)} is not valid YAML; put text in quotes."
            ) from e
    return config_from(TrainConfig, content, where=str(file))


def config_from(kind: type[TrainConfig], content: dict[str, Any], *, where: str) -> TrainConfig:
    """A config from plain values. Unknown keys are errors with a suggestion."""
    for key in content:
        _check_key(kind, key, where=where)
    values = {key: _coerced(kind, key, value) for key, value in content.items()}
    try:
        return kind(**values)
    except TypeError as e:
        raise UserInputError(f"{where}: {e}.") from e


def _check_key(kind: type[TrainConfig], key: object, *, where: str) -> None:
    """Raises UserInputError, with a suggestion, for an unknown key."""
    known = [f.name for f in fields(kind)]
    if key not in known:
        close = _meant(key[:50], known) if isinstance(key, str) else None
        hint = f"; did you mean {close}?" if close else f"; the keys are {', '.join(known)}."
        raise UserInputError(f"{where}: unknown key {shown(key)}{hint}")


def _meant(key: str, known: list[str]) -> str | None:
    """The key with the most similar spelling, if there is one. Keys that share a word with it come first."""
    words = set(key.split("_"))
    related = [name for name in known if words & set(name.split("_"))]
    close = get_close_matches(key, related, n=1, cutoff=0.5) or get_close_matches(key, known, n=1)
    return close[0] if close else None


def _coerced(kind: type[TrainConfig], key: str, value: Any) -> Any:
    """A YAML value in the type of its key. YAML gives 2e-4 as text and tuples as lists. Others must have the type.

    A mask is a word or a number, which the config itself checks.
    """
    default = getattr(kind(), key)
    if value is None and default is not None:
        raise UserInputError(f"{key} has no value; give one or leave the line out.")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not _is_text(text):
            raise UserInputError(f"{key} holds characters that no name or path may hold: {shown(text)}.")
    if key == "corpus":
        return tuple(value) if isinstance(value, list) else (value,)
    if isinstance(value, list) and (default is None or isinstance(default, tuple)):
        return tuple(value)
    if isinstance(default, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise UserInputError(f"{key} must be a number, not {shown(value)}.")
        return number
    if key != "mask" and default is not None and type(value) is not type(default):
        raise UserInputError(f"{key} must be {_KINDS[type(default)]}, not {shown(value)}.")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise UserInputError(f"{key} must be a number of at most 63 bits, not {shown(value)}.")
    return value


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return len(value) < 4096 and "\0" not in value
