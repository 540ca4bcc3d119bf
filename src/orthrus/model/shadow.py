"""Copies of a model's structure that share all of its weights: stock models, and models with another attention.

A shadow replaces some modules of a tree, or gives some another config, and leaves the tree itself as it is. So
no attribute of a live model is ever swapped, and whoever runs the model meanwhile meets what was always there.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

Change = Callable[[str, nn.Module], "nn.Module | dict[str, Any] | None"]
"""(path, module) to the module that stands there, or to attributes of a copy of it; None: as it is."""


def shadow(module: nn.Module, change: Change, path: str = "") -> nn.Module:
    """The tree below `module` with changes made; modules above a change are copied, all others are shared.

    Parameters and buffers are the very same objects; what is assigned to a shared module later shows in both.
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
