"""PEFT on OrthrusForCausalLM: adapters go to the AR side of a twin, so the text is the adapted model's."""

from typing import Any

from wrapt import register_post_import_hook, wrap_function_wrapper


def _inside_twin(find: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, str]:
    """PEFT's (parent, target, name) of a module path; of a twin its AR side, the base's own module."""
    from orthrus.model.twin import Twin

    parent, target, name = find(*args, **kwargs)
    return (target, target.ar, "ar") if isinstance(target, Twin) else (parent, target, name)


def _teach(module: Any) -> None:
    wrap_function_wrapper(module, "_get_submodules", _inside_twin)


register_post_import_hook(_teach, "peft.tuners.tuners_utils")
