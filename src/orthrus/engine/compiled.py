"""The compiled runner: decoder layers as code made for this CPU, over packed weights, kept on disk.

The stock forward stays in charge; only the call of each decoder layer is answered by compiled code. All
layers of a kind share it, so compiling takes seconds, and sizes are dynamic, so it happens once.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from orthrus.base.families import decoder_layers
from orthrus.base.memory import available_bytes
from orthrus.base.quantised import quantisation
from orthrus.base.storage import Progress
from orthrus.engine.fast_layers import fast_layer
from orthrus.engine.layer_code import Arguments, LayerCode, flatten, kind, layer_code, named_tensors
from orthrus.kernels.build import load_kernels
from orthrus.kernels.linear import fast_linear
from orthrus.model.attention import folded_heads
from orthrus.model.dual_view import DualView
from orthrus.model.int8_linear import onednn_is_exact
from orthrus.model.passes import Pass, fused, verify_chain
from orthrus.model.repair import RepairTables
from orthrus.model.slot_cache import SlotCache

MOST_PROMPT_ROWS = 128
"""Longer chunks of a prompt run through the stock layers where these are made for many rows."""


def compile_passes(dual: DualView, on_progress: Progress | None = None) -> None:
    """Run passes as compiled code from now on; raises what goes wrong on the way, and leaves nothing behind.

    Packs the weights, which takes as much memory again, and compiles (seconds the first time, kept in the
    cache folder).
    """
    try:
        load_kernels(on_progress)
        compiled = CompiledRunner(dual, on_progress)
        tables = RepairTables.of(dual)
        move = torch.ops.orthrus.move_slots
        dual.accelerate(
            "compiled", compiled, compiled.head, compiled.draft_head, repair_tables=tables, move=move
        )
        _prepare(dual)
    except Exception:
        dual.accelerate("eager")
        raise


@torch.inference_mode()
def _prepare(dual: DualView) -> None:
    """Compile, or load from the cache folder, all code that passes will need."""
    history, size = 11, dual.config.block_size
    cache = dual.new_cache(history + 5 + size + 101)
    cache.lengths = [history]
    ids_15 = torch.arange(5)[None] % dual.base.config.vocab_size
    passes = [
        verify_chain(ids_15, [history]),
        fused(ids_15, [0, 1, 0, 3], [history], [2], size, dual.mask_token_id),
    ]
    for p in passes:
        dual.hidden(p, cache)


Way = Literal["each", "waiting", "alike"]
"""How layers are run: each when it is called; all when the last one is called; all by one call."""


def stock_is_slow(dual: DualView) -> bool:
    """Whether this processor has no instructions by which PyTorch multiplies many rows of the model's kind.

    Four bits are unpacked for each product on any processor, and int8 goes through float32 without VNNI.
    """
    if dual.precision is not None:
        return dual.precision == "int4" or not onednn_is_exact()
    has_onednn = torch.backends.mkldnn.is_available()
    has_bfloat16 = has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dual.dtype == torch.bfloat16 and not has_bfloat16


class CompiledRunner:
    """Stands in for the decoder layers of a model during a pass; see `DualView.accelerate`.

    Passes of one sequence only, and long chunks of a prompt only where `stock_is_slow`: others run through
    the stock layers. The weights are packed when it is made; what changes them later is not seen.

    Where the stock forward hands each layer just what the one before it returned, as the first pass shows,
    layers only take note of their call, and the last one runs them all without a way back to Python between;
    where it gives all of them the same besides, one call stands for all. Unless somebody has hooks on them.
    """

    def __init__(self, dual: DualView, on_progress: Progress | None = None) -> None:
        """on_progress: called only while code is compiled that the cache folder does not have."""
        self._dual, self._on_progress = dual, on_progress
        self._decoder = dual.base.get_decoder()
        self._layers = list(decoder_layers(dual.base))
        self._code: dict[tuple[int, bool], LayerCode] = {}
        fast = [fast_layer(layer) for layer in self._layers]
        self._compiled = torch.classes.orthrus.Layers([list(named_tensors(layer).values()) for layer in fast])
        kinds: dict[Any, int] = {}
        self._kinds = [kinds.setdefault(kind(layer), i) for i, layer in enumerate(fast)]
        self._examples = {first: fast[first] for first in kinds.values()}
        self.head = fast_linear([dual.base.get_output_embeddings()])
        self.draft_head = None if dual.draft_head is None else fast_linear([dual.draft_head])
        self._takes_long_prompts = stock_is_slow(dual)
        # Built once, since setting up thirty closures a pass would show.
        self._forwards = [self._forward(i) for i in range(len(self._layers))]
        self._stack = _Stack(len(self._layers), self._all)
        self._way: Way | None = None
        self._now: _Running | None = None

    @contextmanager
    def __call__(self, p: Pass, cache: SlotCache) -> Iterator[dict[str, Any]]:
        """Answer the calls of the decoder layers for this pass."""
        long_prompt = p.is_prompt and p.num_rows > MOST_PROMPT_ROWS and not self._takes_long_prompts
        # Compiled sizes are at least two, but for the number of rows.
        if p.token_ids_BT.shape[0] != 1 or p.num_slots < 2 or long_prompt:
            with folded_heads(self._dual.base.config, self._dual.device) as more:
                yield more
            return
        modules = self._decoder._modules
        found, way = modules["layers"], self._way or "each"
        if _hooked(self._layers):
            way = "each"
        elif way == "alike" and list(found.children()) != self._layers:
            way = "waiting"
        # A finished request's cache is to be freed, so all that belongs to a pass ends with it.
        self._now = now = _Running(p, cache, way)
        if way == "alike":
            modules["layers"] = self._stack
        else:
            for layer, forward in zip(self._layers, self._forwards, strict=True):
                layer.__dict__["forward"] = forward
        try:
            yield {}
            if now.codes or (way == "alike" and not now.num_called):
                raise RuntimeError("the stock forward has left out the last layer.")
            if self._way is None:
                self._way = now.seen(len(self._layers))
        finally:
            modules["layers"] = found
            for layer in self._layers:
                layer.__dict__.pop("forward", None)
            self._now = None

    def _forward(self, index: int) -> Callable[..., Tensor]:
        """What stands for a layer that is called for itself."""
        is_last = index == len(self._layers) - 1

        def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            now = self._now
            assert now is not None
            given = now.take(index, hidden_states, kwargs)
            now.codes.append(self._code_of(index, hidden_states, given))
            if now.way == "waiting" and not is_last:
                return hidden_states
            codes, now.codes = now.codes, []
            now.hidden_1TC = self._run(index + 1 - len(codes), codes, hidden_states, now.given[-len(codes) :])
            return now.hidden_1TC

        return forward

    def _all(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """What stands for all layers."""
        now = self._now
        assert now is not None
        given = now.take(0, hidden_states, kwargs)
        codes = [self._code_of(i, hidden_states, given) for i in range(len(self._layers))]
        return self._run(0, codes, hidden_states, now.given)

    def _run(
        self, first: int, codes: list[LayerCode], hidden_1TC: Tensor, given: list[list[Tensor]]
    ) -> Tensor:
        now = self._now
        assert now is not None
        stores = now.cache.keys, now.cache.values
        rest = [] if now.marker is None else [now.marker]
        out: Tensor = self._compiled.run(
            first, codes, hidden_1TC.contiguous(), given, now.slots_T, *stores, rest
        )
        return out

    def _code_of(self, index: int, hidden_1TC: Tensor, given: dict[str, Any]) -> LayerCode:
        now = self._now
        assert now is not None
        key = self._kinds[index], now.marker is not None
        if key not in self._code:
            stores = now.cache.keys[index], now.cache.values[index]
            self._make(key, Arguments(hidden_1TC, given, now.slots_T, *stores, now.marker))
        return self._code[key]

    def _make(self, key: tuple[int, bool], arguments: Arguments) -> None:
        """The code of a kind of layers, when the first of them is called; `_prepare` sees to all."""
        config, progress = self._dual.base.config, self._on_progress
        self._code[key] = layer_code(self._examples[key[0]], arguments, config=config, progress=progress)


class _Stack(nn.ModuleList):
    """A list of layers of which one call stands for all."""

    def __init__(self, num_layers: int, run: Callable[..., Tensor]) -> None:
        stand_in = nn.Module()
        stand_in.__dict__["forward"] = run
        super().__init__([stand_in])
        self._every = range(num_layers)

    def __getitem__(self, index: Any) -> Any:
        if self._every[index] != self._every:
            raise RuntimeError("the stock forward has left out a layer.")
        return self


def _hooked(layers: Sequence[nn.Module]) -> bool:
    """Whether somebody looks at what layers get and return, or changes it."""
    every = torch.nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return True
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


class _Running:
    """One pass on its way through the layers: given, what each has been called with besides hidden states,
    flattened; codes, of those that have not been run yet; hidden_1TC, what the last one was called with or
    has returned; is_chain: whether all were called in turn, each with just what the one before returned."""

    def __init__(self, p: Pass, cache: SlotCache, way: Way) -> None:
        self.cache, self.way = cache, way
        self.slots_T = p.slots_BT[0]
        mixed = p.num_ar_rows < p.num_rows
        self.marker = torch.empty(p.num_ar_rows + 1, 0) if mixed else None
        self.codes: list[LayerCode] = []
        self.given: list[list[Tensor]] = []
        self.hidden_1TC: Tensor | None = None
        self.num_called = 0
        self.is_chain = True
        self._given: dict[tuple[int, ...], tuple[dict[str, Any], list[Tensor], Any]] = {}

    def take(self, index: int, hidden_1TC: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take note of a layer's call; returns the tensors that it was given by name."""
        self.is_chain &= index == self.num_called and (index == 0 or hidden_1TC is self.hidden_1TC)
        self.num_called += 1
        if self.way != "each" and not self.is_chain:
            raise RuntimeError("the stock forward has changed its way from layer to layer.")
        self.hidden_1TC = hidden_1TC
        # Flattened once for layers that share them; kept themselves, so that nothing else can take their ids.
        key = tuple(map(id, kwargs.values()))
        if key not in self._given:
            given: dict[str, Any] = {n: v for n, v in kwargs.items() if isinstance(v, Tensor | tuple)}
            self._given[key] = given, flatten(given), kwargs
        given, flat, _ = self._given[key]
        self.given.append(flat)
        return given

    def seen(self, num_layers: int) -> Way:
        """How the layers of such a forward can be run."""
        if not self.is_chain or self.num_called != num_layers:
            return "each"
        return "alike" if len(self._given) == 1 else "waiting"


def compile_problem(dual: DualView) -> str | None:
    """Why compiled code is not made for this model or machine; None where it is.

    Ends a sentence that begins with "the compiled runner", as those of the next two functions do.
    """
    if (method := quantisation(dual.base.config)) is not None:
        return f"does not run {method} weights"
    if dual.device.type != "cpu":
        return f"is made for CPUs, and the model is on {dual.device.type}"
    machine = platform.machine()
    if sys.platform != "linux" or machine.lower() not in ("x86_64", "amd64"):
        # Others may do: nobody has run the tests there yet.
        return f"is made for x86-64 Linux only, and this is {platform.system() or sys.platform} on {machine}"
    return None


def compiler_problem() -> str | None:
    """What is missing to compile with; None where nothing is."""
    if any(shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++") if c):
        return None
    return "needs a C++ compiler, and none is on the PATH: install g++ or clang++"


def memory_problem(dual: DualView) -> str | None:
    """What is missing of memory for packed weights beside the stock ones, and a repair head's tables."""
    num_bytes = sum(t.nbytes for t in (*dual.base.parameters(), *dual.base.buffers()))
    num_bytes += 2 * dual.vocab_size * (dual.config.repair_rank or 0) * dual.dtype.itemsize
    needed, available = 1.2 * num_bytes, available_bytes()
    if available > needed:
        return None
    return (
        f"keeps the weights twice and needs {needed / 1e9:.1f} GB more, and {available / 1e9:.1f} GB of "
        "memory are free: free some, or choose a smaller dtype"
    )
