"""The frozen base model: from a name to weights, tokenizer and facts. Loads no torch until it is asked to."""

from orthrus.base.families import (
    FAMILIES,
    Family,
    attention_modules,
    check_layers,
    context_length,
    find_family,
    layer_windows,
)
from orthrus.base.fingerprint import fingerprint
from orthrus.base.loading import Base, load_base
from orthrus.base.resolve import Source, resolve
from orthrus.base.storage import Progress, cache_dir

__all__ = [
    "FAMILIES",
    "Base",
    "Family",
    "Progress",
    "Source",
    "attention_modules",
    "cache_dir",
    "check_layers",
    "context_length",
    "find_family",
    "fingerprint",
    "layer_windows",
    "load_base",
    "resolve",
]
