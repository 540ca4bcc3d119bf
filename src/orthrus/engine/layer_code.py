"""A decoder layer as a function of its tensors, compiled ahead of time, once for all layers of one kind."""

import copy
import hashlib
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from orthrus.base.compiled_files import kept_code
from orthrus.base.provenance import processor
from orthrus.base.storage import Progress
from orthrus.engine import fast_layers, layer_attention
from orthrus.kernels import build, linear
from orthrus.model import int4_linear, int8_linear, twin
from orthrus.model.pool import PAGE
from orthrus.model.twin import RowSplit, Twin

if TYPE_CHECKING:
    from torch.export import ExportedProgram

LayerCode = Any
"""The code of a kind of layers, for `torch.classes.orthrus.Layers`: a function from a layer's tensors, hidden_1TC and
`Arguments.flat` to hidden_1TC."""


def named_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by their paths. A tensor that two modules share is listed twice."""
    found = dict(layer.named_parameters(remove_duplicate=False))
    return found | dict(layer.named_buffers(remove_duplicate=False))


def kind(layer: nn.Module) -> tuple[Any, ...]:
    """The kind of a layer. Layers of equal kind differ only in the values of their tensors."""
    modules = tuple((name, type(module), _settings(module)) for name, module in layer.named_modules())
    return modules, tuple((name, t.shape, t.dtype) for name, t in named_tensors(layer).items())


class Arguments(NamedTuple):
    """The arguments of a layer. T: rows of the pass.

    given: the further arguments of its stock forward by name, tensors or tuples of them. slots_T: the slots to write.
    keys, values: the pool's stores. plan_P: the pass's plan. marker: an empty tensor (num_ar_rows + 1, 0), because
    compiled code takes a number only as a size; None if all rows are AR.
    """

    hidden_1TC: Tensor
    given: dict[str, Any]
    slots_T: Tensor
    keys: Tensor
    values: Tensor
    plan_P: Tensor
    marker: Tensor | None

    def flat(self) -> list[Tensor]:
        """All tensors but the hidden states, in the order of `torch.classes.orthrus.Layers`."""
        rest = [] if self.marker is None else [self.marker]
        return [*flatten(self.given), self.slots_T, self.keys, self.values, self.plan_P, *rest]


def flatten(given: dict[str, Any]) -> list[Tensor]:
    """The tensors of a layer's keyword arguments, contiguous as the compiled code expects."""
    values = (v for value in given.values() for v in (value if isinstance(value, tuple) else (value,)))
    return [value.contiguous() for value in values]


def layer_code(
    layer: nn.Module, example: Arguments, *, config: Any, progress: Progress | None = None
) -> LayerCode:
    """The code of layers of this kind, from the cache folder, or compiled now and kept there.

    The numbers of rows, AR rows, slots and plan entries are open sizes; they must all differ in the example. Kind,
    dtype and batch size 1 are fixed by the example. The code checks nothing and is never compiled anew. config: the
    model's, a part of the code's name on disk. progress: called only during compilation. Raises the compiler's errors,
    and StorageError if the cache folder cannot be used.
    """

    def make(folder: Path) -> Path:
        # Importing the compiler takes seconds, and most starts find the code on disk.
        from torch._inductor import aot_compile

        options = {**_OPTIONS, "aot_inductor.custom_ops_to_c_shims": build.c_functions()}
        # With a file's path, the compiler writes all files of this code beside it. (Its own cache, with headers for any
        # code, stays.)
        options["aot_inductor.output_path"] = str(folder / "layers.so")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = _exported(layer, example)
            args, kwargs = exported.example_inputs
            made = aot_compile(exported.module(), args, kwargs, options=options)
        assert isinstance(made, str), "one library, as its path was given"
        return Path(made)

    return kept_code(f"layers-{_digest(layer, example, config)}", make, _loaded, progress)


@cache
def _loaded(path: Path) -> LayerCode:
    """Load a library, once per process, because each loading would create another copy."""
    return torch.classes.orthrus.LayerCode(str(path))


@cache
def sources_digest() -> str:
    """Digest of the sources that decide what compiled layers compute, and what they cost."""
    modules = (fast_layers, linear, layer_attention, int4_linear, int8_linear, twin)
    paths = [Path(__file__), *build.SOURCES, *(Path(module.__file__ or "") for module in (build, *modules))]
    return hashlib.sha256(b"".join([path.read_bytes() for path in paths])).hexdigest()


# Rounding after each operation, as in the stock code, makes a row independent of what is fused in its kind of pass. The
# asserts are off because packed weights cannot pass them. The code must not depend on the number of threads.
_OPTIONS = {
    "emulate_precision_casts": True,
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
    "cpp.dynamic_threads": True,
}


def _digest(layer: nn.Module, example: Arguments, config: Any) -> str:
    """The code's name: a digest of all that it depends on, including our sources and the processor."""
    settings = {k: v for k, v in config.to_dict().items() if not k.startswith("_name")}
    parts = (
        (torch.__version__, transformers.__version__, sources_digest()),
        processor(),
        sorted(settings.items(), key=str),
        kind(layer),
        [
            (name, [(t.ndim, t.dtype) for t in flatten({name: value})])
            for name, value in example.given.items()
        ],
        (example.hidden_1TC.dtype, example.keys.shape[1::2], example.keys.dtype),
        example.marker is None,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _exported(layer: nn.Module, example: Arguments) -> "ExportedProgram":
    """The graph of a layer of this kind as a function of flat tensors, with open sizes of the pass."""
    template, split = _template(layer)
    names = list(named_tensors(template))
    lengths = {n: len(v) if isinstance(v, tuple) else None for n, v in example.given.items()}

    class Layer(nn.Module):
        def forward(self, *flat: Tensor) -> Tensor:
            tensors, (hidden_1TC, *rest) = flat[: len(names)], flat[len(names) :]
            given: dict[str, Any] = {}
            for name, length in lengths.items():
                given[name] = rest.pop(0) if length is None else tuple(rest.pop(0) for _ in range(length))
            slots_T, keys, values, plan_P, *marker = rest
            num_rows = hidden_1TC.shape[1]
            torch._check(keys.shape[2] * PAGE == values.shape[2])
            torch._check(slots_T.shape[0] == num_rows)
            split.num_ar_rows = num_rows
            if marker:
                split.num_ar_rows = marker[0].shape[0] - 1
                torch._check(split.num_ar_rows < num_rows)
            store = _Store(keys, values, slots_T)
            out: Tensor = torch.func.functional_call(
                template,
                dict(zip(names, tensors, strict=True)),
                (hidden_1TC,),
                {
                    **given,
                    "attention_mask": None,
                    "past_key_values": store,
                    "use_cache": True,
                    "plan_P": plan_P,
                },
            )
            return out

    from torch.export import export

    tensors = list(named_tensors(layer).values())
    return export(
        Layer(),
        (*tensors, example.hidden_1TC, *example.flat()),
        dynamic_shapes={"flat": (*[None] * len(tensors), *_open_sizes(example))},
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _open_sizes(example: Arguments) -> list[dict[int, Any] | None]:
    """For each flat argument, the dimensions that change from pass to pass."""
    from torch.export import Dim

    num_rows = example.hidden_1TC.shape[1]
    sizes: list[dict[int, Any] | None] = [{1: Dim.DYNAMIC}]
    for name, value in example.given.items():
        # The arguments are positions (1, T), and their cosines and sines (1, T, D). Only this dimension is checked,
        # because another size may equal T.
        for tensor in flatten({name: value}):
            place = min(tensor.ndim - 1, 1)
            sizes.append({place: Dim.DYNAMIC} if tensor.ndim and tensor.shape[place] == num_rows else None)
    sizes += [{0: Dim.DYNAMIC}, {2: Dim.DYNAMIC}, {2: Dim.DYNAMIC}, {0: Dim.DYNAMIC}]
    return sizes if example.marker is None else [*sizes, {0: Dim.DYNAMIC}]


class _Store:
    """The pool's stores of one layer, with transposed keys, behind the interface of a transformers cache."""

    def __init__(self, keys: Tensor, values: Tensor, slots_T: Tensor) -> None:
        self.keys, self.values, self.slots_T = keys, values, slots_T

    def update(
        self, keys_1HTD: Tensor, values_1HTD: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys[:, :, self.slots_T // PAGE, :, self.slots_T % PAGE] = keys_1HTD.permute(2, 0, 1, 3).to(
            self.keys.dtype
        )
        self.values.index_copy_(2, self.slots_T, values_1HTD.to(self.values.dtype))
        return self.keys, self.values


def _template(layer: nn.Module) -> tuple[nn.Module, RowSplit]:
    """The layer without the values of its tensors, and the split that its twins share.

    If the template held a layer's own tensors, the compiler would build that layer's values into the code.
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
        if config is not None:
            config._attn_implementation = layer_attention.COMPILED
    return template, split


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The settings on which a module's code may branch, such as windows, layer types and rotated positions."""
    plain = (bool, int, float, str, type(None))
    found = {name: value for name, value in vars(module).items() if isinstance(value, plain)}
    found.pop("layer_idx", None)
    return tuple(sorted(found.items()))
