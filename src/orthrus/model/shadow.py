"""Copies of a module tree that share all of its weights: stock models, and models with another attention.

A shadow replaces some modules of a tree, or their configs, and leaves the tree itself unchanged. So no attribute of a
live model is ever swapped, and other threads may run the model at the same time.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

Change = Callable[[str, nn.Module], "nn.Module | dict[str, Any] | None"]
"""Maps (path, module) to a replacement, or to changed attributes of a copy; None leaves the module as it is."""


def shadow(module: nn.Module, change: Change, path: str = "") -> nn.Module:
    """The tree below `module` with changes. Modules above a change are copied, and all others are shared.

    Parameters and buffers are the same objects. A later assignment to a shared module takes effect in both trees.
    """
    changed = change(path, module)
    if isinstance(changed, nn.Module):
        return changed
    children = {
        name: child if child is None else shadow(child, change, f"{path}.{name}" if path else name)
        for name, child in module._modules.items()
    }
    if changed is None and all(child is module._modules[name] for name, child in children.items()):
        return module
    copied = object.__new__(type(module))
    copied.__dict__ = module.__dict__ | {"_modules": children} | (changed or {})
    return copied
