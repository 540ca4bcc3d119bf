"""Orthrus: lossless parallel decoding for language models (arXiv 2605.12825).

A frozen model drafts many tokens at once through a second, trained view, and commits only its own.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from orthrus.api import Conversation, Orthrus
    from orthrus.config import Grammar
    from orthrus.engine.stream import TokenStream
    from orthrus.errors import OrthrusError
    from orthrus.hf.auto import OrthrusForCausalLM
    from orthrus.hf.config import OrthrusConfig
    from orthrus.types import Cycle, DecodeStats, GenerationResult

__all__ = [
    "Conversation",
    "Cycle",
    "DecodeStats",
    "GenerationResult",
    "Grammar",
    "Orthrus",
    "OrthrusConfig",
    "OrthrusError",
    "OrthrusForCausalLM",
    "TokenStream",
    "__version__",
]
__version__ = version("orthrus-lm")

_HOME = {
    "Conversation": "api",
    "Cycle": "types",
    "DecodeStats": "types",
    "GenerationResult": "types",
    "Grammar": "config",
    "Orthrus": "api",
    "OrthrusConfig": "hf.config",
    "OrthrusError": "errors",
    "OrthrusForCausalLM": "hf.auto",
    "TokenStream": "engine.stream",
}


def __getattr__(name: str) -> Any:
    """Load the heavy parts when they are first asked for: `import orthrus` takes no torch."""
    if name in _HOME:
        return getattr(import_module(f"orthrus.{_HOME[name]}"), name)
    raise AttributeError(f"module 'orthrus' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _register_auto_classes(_: Any) -> None:
    """AutoModelForCausalLM learns our folders as soon as transformers' own Auto classes exist."""
    try:
        import_module("orthrus.hf.auto")
    except ImportError:
        # transformers is still in the middle of its imports; the hook of its next module tries again.
        return


for _module in (
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "transformers.generation.utils",
):
    register_post_import_hook(_register_auto_classes, _module)
