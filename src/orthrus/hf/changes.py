"""Whether a live transformers model has changed: its weights, its adapters, its dtype or its device."""

from collections.abc import Hashable

from torch import Tensor, nn

_ADAPTER_STATE = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")


def state_of(model: nn.Module) -> Hashable:
    """A value that differs after each change that a forward would show; equal as long as nothing changes.

    It looks at no weight itself, only at where each lies and how often it was written in place. Of a layer of PEFT it
    sees which adapters count, and how much.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return (
        tuple(id(module) for module in model.modules()),
        tuple(map(_tensor_state, tensors)),
        tuple(
            tuple(repr(vars(module).get(name)) for name in _ADAPTER_STATE)
            for module in model.modules()
            if "_active_adapter" in vars(module)
        ),
    )


def _tensor_state(tensor: Tensor) -> Hashable:
    # Tensors that inference mode made cannot be written outside of it, and count nothing.
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device
