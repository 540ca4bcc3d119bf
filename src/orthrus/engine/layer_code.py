"""One decoder layer as a function of its tensors, so that compiled code serves all layers of its kind."""

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthrus.model.attention import attend_folded
from orthrus.model.cpu_linears import PackedLinear, packable
from orthrus.model.twin import RowSplit, Twin

LayerCode = Callable[..., Tensor]
"""(tensors, hidden_1TC, kwargs of the stock layer, slots_T, keys, values, marker) -> hidden_1TC. The marker
(num_ar_rows + 1, 0) carries a number that compiled code takes as a size; None where all rows are AR."""

_ATTENTION, _EXACT_ATTENTION = "orthrus_compiled", "orthrus_compiled_exact"


def _compiled_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    keys_BHSD: Tensor,
    values_BHSD: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `folded_attention`, with a mask (B, 1, T, S) that compiled code folds where it is used."""
    batch, num_heads, num_rows, _size = query_BHTD.shape
    group = num_heads // keys_BHSD.shape[1]
    mask = attention_mask.expand(batch, group, num_rows, -1).reshape(batch, 1, group * num_rows, -1)
    return attend_folded(query_BHTD, keys_BHSD, values_BHSD, mask, scaling), None


def _exact_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    keys_BHSD: Tensor,
    values_BHSD: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same, with its sums in float64: rounded to float32, they do not show in which order they were made.

    So a row comes out alike to the last bit in whatever pass it stands and wherever in the cache its past
    lies. An int8 model needs that: a last bit can push an activation over a rounding step.
    """
    batch, num_heads, num_rows, size = query_BHTD.shape
    num_kv = keys_BHSD.shape[1]
    rows = query_BHTD.double().reshape(batch, num_kv, num_heads // num_kv * num_rows, size)
    scores = (rows @ keys_BHSD.double().transpose(2, 3)).view(batch, num_kv, -1, num_rows, keys_BHSD.shape[2])
    scores = scores * (size**-0.5 if scaling is None else scaling)
    scores = scores.masked_fill(~attention_mask[:, :, None], -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).float().exp().double()
    sums = weights.sum(-1, keepdim=True).flatten(2, 3)
    out = weights.flatten(2, 3) @ values_BHSD.double() / sums
    return out.view(batch, num_heads, num_rows, size).transpose(1, 2).to(query_BHTD.dtype).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _compiled_attention)
ALL_ATTENTION_FUNCTIONS.register(_EXACT_ATTENTION, _exact_attention)


def packed(layer: nn.Module) -> nn.Module:
    """The layer with its plain linears packed; all other tensors are shared with the original."""
    shared = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    twin: nn.Module = copy.deepcopy(layer, shared)
    for parent in twin.modules():
        for name, child in parent.named_children():
            if packable(child):
                setattr(parent, name, PackedLinear(child))  # type: ignore[arg-type]
    return twin


def named_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by their paths; one that two modules share comes twice."""
    found = dict(layer.named_parameters(remove_duplicate=False))
    return found | dict(layer.named_buffers(remove_duplicate=False))


def kind(layer: nn.Module) -> tuple[Any, ...]:
    """Layers of equal kind differ in the values of their tensors only."""
    modules = tuple((name, type(module), _settings(module)) for name, module in layer.named_modules())
    return modules, tuple((name, t.shape, t.dtype) for name, t in named_tensors(layer).items())


def layer_code(layer: nn.Module, name: str, *, exact: bool = False, **options: Any) -> LayerCode:
    """Compile what a layer of this kind computes, over a preallocated cache; `name` is to be unique.

    Rows, AR rows, slots read and slots stored are dynamic. There are no guards: the caller vouches that layer
    kind, dtype and batch size 1 stay, so nothing is ever compiled anew. exact: rows that do not depend on the
    shape of their pass, where all linears are int8 and the attention is sdpa. options: of inductor.
    """
    template, split = _template(layer, _EXACT_ATTENTION if exact else _ATTENTION)
    names = list(named_tensors(template))

    def run(
        tensors: Sequence[Tensor],
        hidden_1TC: Tensor,
        kwargs: dict[str, Any],
        slots_T: Tensor,
        keys: Tensor,
        values: Tensor,
        marker: Tensor | None,
    ) -> Tensor:
        num_rows = hidden_1TC.shape[1]
        torch._check(keys.shape[2] == values.shape[2])
        split.num_ar_rows = num_rows
        if marker is not None:
            split.num_ar_rows = marker.shape[0] - 1
            torch._check(marker.shape[0] - 1 < num_rows)
        store = _Store(keys, values, slots_T, kwargs["attention_mask"].shape[-1])
        out: Tensor = torch.func.functional_call(
            template,
            dict(zip(names, tensors, strict=True)),
            (hidden_1TC,),
            {**kwargs, "past_key_values": store, "use_cache": True},
        )
        return out

    # Compiled code is kept by code object: without one of its own, another layer's code would be taken.
    code = run.__code__.replace(co_name=name)
    own = types.FunctionType(code, run.__globals__, name, None, run.__closure__)
    compiled: LayerCode = torch.compile(
        own, fullgraph=True, options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, **options}
    )
    return compiled


def mark_sizes(
    hidden_1TC: Tensor,
    kwargs: dict[str, Any],
    slots_T: Tensor,
    keys: Tensor,
    values: Tensor,
    marker: Tensor | None,
) -> None:
    """Tell the compiler which sizes of these arguments change from pass to pass."""
    mark = torch._dynamo.maybe_mark_dynamic
    mask, num_rows = kwargs["attention_mask"], hidden_1TC.shape[1]
    mark(slots_T, 0)
    mark(mask, 2)
    mark(mask, 3)
    # Positions (1, T), their cosines and sines (1, T, D): by place, since another size may equal T by chance.
    for tensor in (hidden_1TC, *_tensors(value for name, value in kwargs.items() if value is not mask)):
        if tensor.ndim > 1 and tensor.shape[1] == num_rows:
            mark(tensor, 1)
    mark(keys, 2)
    mark(values, 2)
    if marker is not None:
        mark(marker, 0)


class _Store:
    """The slot cache of one layer, as the stock attention talks to it."""

    def __init__(self, keys: Tensor, values: Tensor, slots_T: Tensor, num_read: int) -> None:
        self.keys, self.values, self.slots_T, self.num_read = keys, values, slots_T, num_read

    def update(
        self, keys_1HTD: Tensor, values_1HTD: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.slots_T, keys_1HTD)
        self.values.index_copy_(2, self.slots_T, values_1HTD)
        return self.keys[:, :, : self.num_read], self.values[:, :, : self.num_read]


def _template(layer: nn.Module, attention: str) -> tuple[nn.Module, RowSplit]:
    """The layer without its values, and the split that its twins share.

    A template that held a layer's own tensors would be taken for that layer by the compiler.
    """
    hollow = {
        id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for tensor in (*layer.parameters(), *layer.buffers())
    }
    for parameter in layer.parameters():
        hollow[id(parameter)] = nn.Parameter(hollow[id(parameter)], requires_grad=False)
    template: nn.Module = copy.deepcopy(layer, hollow)
    splits = [module.split for module in template.modules() if isinstance(module, Twin)]
    split = splits[0] if splits else RowSplit()
    for module in template.modules():
        config = getattr(module, "config", None)
        if config is not None and config._attn_implementation == "sdpa":
            config._attn_implementation = attention
    return template, split


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What a module's code may branch on: windows, layer types, whether positions are rotated."""
    plain = (bool, int, float, str, type(None))
    found = {name: value for name, value in vars(module).items() if isinstance(value, plain)}
    found.pop("layer_idx", None)
    return tuple(sorted(found.items()))


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple):
            found += _tensors(value)
    return found
