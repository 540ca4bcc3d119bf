"""Tensors that say they lie on `cuda:0` and compute on the CPU, with the rules of a device and without one.

An operation on tensors of two devices fails as on a GPU, so that a tensor left on the CPU shows. FakeTensorMode
has these rules too, but no numbers: nothing could be read back, chosen or compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("cuda:0")
_COPIES = {"_to_copy", "to", "copy_", "_copy_from"}
# They take an index from the host, as on a GPU.
_INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class Pretended(torch.Tensor):
    """A tensor on the pretended device; `inner` holds its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Pretended":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"pretended({self.inner})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            # It asks the device for the kernel that fits; there is none here.
            return _attend(*args, **(kwargs or {}))
        if func is torch.Tensor.tolist:
            # torch refuses to read out of a subclass.
            return args[0].inner.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return _UNGUARDED.get(func, func)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on the device and moved to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [value for value in leaves if isinstance(value, torch.Tensor)]
    there = any(isinstance(tensor, Pretended) for tensor in tensors)
    wanted = next((value for value in leaves if isinstance(value, torch.device)), None)
    if there and name not in _COPIES:
        foreign = [t for t in tensors if not isinstance(t, Pretended) and t.ndim]
        if foreign and not (name in _INDEXED and all(not t.is_floating_point() for t in foreign)):
            raise RuntimeError(f"{name} found at least two devices, cuda:0 and cpu")
    if wanted is not None:
        there = wanted.type == "cuda"
    inner_args, inner_kwargs = tree_map_only(Pretended, lambda t: t.inner, (args, kwargs))
    inner_args, inner_kwargs = tree_map_only(
        torch.device, lambda _: torch.device("cpu"), (inner_args, inner_kwargs)
    )
    out = func(*inner_args, **inner_kwargs)
    if name.endswith("_") and not name.endswith("__"):
        return args[0]
    if not there:
        return out
    # A view of an ordinary tensor is one too, wherever it is taken.
    ordinary = any(isinstance(tensor, Pretended) and not tensor.is_inference() for tensor in tensors)
    with torch.inference_mode(torch.is_inference_mode_enabled() and not ordinary):
        return tree_map_only(torch.Tensor, Pretended, out)


def _basic(tensor: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[Any]]:
    """What slices, numbers, None and ... leave of a tensor; for each of its dimensions an index, or None."""
    index = list(index) if isinstance(index, tuple) else [index]
    # What takes dimensions: a bool mask as many as it has.
    takes = [
        i.ndim if isinstance(i, torch.Tensor) and i.dtype == torch.bool else int(i is not None) for i in index
    ]
    if Ellipsis in [i for i in index if not isinstance(i, torch.Tensor)]:
        at = next(n for n, i in enumerate(index) if i is Ellipsis)
        index[at : at + 1] = [slice(None)] * (tensor.ndim - sum(takes) + 1)
    dim, left = 0, []
    for part in index:
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        elif isinstance(part, torch.Tensor) and part.dtype == torch.bool:
            left += [part, *[()] * (part.ndim - 1)]
            dim += part.ndim
            continue
        else:
            left.append(part if isinstance(part, torch.Tensor) else torch.tensor(part, device=tensor.device))
            dim += 1
            continue
        left.append(None)
        dim += 1
    return tensor, [part for part in left if not isinstance(part, tuple)] if any(
        p is not None for p in left
    ) else []


def _item(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    rest, left = _basic(tensor, index)
    return torch.ops.aten.index(rest, left) if left else rest


def _set_item(tensor: torch.Tensor, index: Any, value: Any) -> None:
    rest, left = _basic(tensor, index)
    if not isinstance(value, torch.Tensor):
        value = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
    if left:
        torch.ops.aten.index_put_(rest, left, value)
    else:
        _copy(rest, value)


def _copy(target: torch.Tensor, source: torch.Tensor, *_: Any) -> torch.Tensor:
    """`copy_`, which may take from another device, and which nothing here takes gradients of."""
    target_inner, source_inner = (getattr(tensor, "inner", tensor) for tensor in (target, source))
    target_inner.copy_(source_inner)
    return target


def _nonzero(tensor: torch.Tensor, *, as_tuple: bool = False) -> Any:
    found = torch.ops.aten.nonzero(tensor)
    return found.unbind(1) if as_tuple else found


# What Python's bindings do under a guard of the device, which a build without CUDA has not.
_UNGUARDED: dict[Any, Any] = {
    torch.Tensor.__getitem__: _item,
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.copy_: _copy,
    torch.Tensor.__invert__: torch.ops.aten.bitwise_not,
    torch.Tensor.nonzero: _nonzero,
    torch.Tensor.contiguous: lambda tensor: (
        tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
    ),
}


def _attend(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The formula, in operations that every device has."""
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5
    if kwargs.get("enable_gqa"):
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.mT * scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


@contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    """Inside, `cuda:0` can be computed on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        torch._C._ensureCUDADeviceGuardSet()
        patch.setattr(torch.cuda, "mem_get_info", lambda _device=None: (2**30, 2**30))
        patch.setattr(torch.cuda, "get_device_name", lambda _device=None: "pretended")
        patch.setattr(torch.cuda, "synchronize", lambda _device=None: None)
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with PretendedDevice():
                yield DEVICE
        finally:
            torch._C._set_only_lift_cpu_tensors(before)


def place(module: torch.nn.Module) -> None:
    """Put a module's parameters and buffers on the device; tied ones stay tied."""
    made: dict[torch.Tensor, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and not isinstance(parameter, Pretended):
                if parameter not in made:
                    there = Pretended(parameter.detach())
                    made[parameter] = torch.nn.Parameter(there, parameter.requires_grad)
                part._parameters[name] = made[parameter]
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and not isinstance(buffer, Pretended):
                part._buffers[name] = Pretended(buffer)
