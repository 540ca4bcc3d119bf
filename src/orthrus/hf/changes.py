"""Whether a live transformers model has changed: its weights, its adapters, its dtype or its device."""

from collections.abc import Hashable

from torch import Tensor, nn

_ADAPTER_STATE = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")


def state_of(model: nn.Module) -> Hashable:
    """A value that changes whenever the model changes, and stays equal as long as it does not.

    It does not read the weights. It holds the address of each tensor and the number of writes in place, and for layers
    of PEFT the active adapters and their scales.
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
    # Tensors that were created in inference mode count no writes.
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device
