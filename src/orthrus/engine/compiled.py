"""The compiled runner: decoder layers as code made for this CPU, over packed weights, kept on disk.

The stock forward stays in charge; only the call of each decoder layer is answered by compiled code. All
layers of a kind share it, so compiling takes seconds, and sizes are dynamic, so it happens once.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from orthrus.base.families import decoder_layers
from orthrus.base.quantised import quantisation
from orthrus.base.storage import Progress, cache_dir
from orthrus.engine.fast_layers import fast_layer
from orthrus.engine.kernels.build import load_kernels
from orthrus.engine.kernels.linear import fast_linear
from orthrus.engine.layer_code import Arguments, LayerCode, flatten, kind, layer_code, named_tensors
from orthrus.model.attention import folded_heads
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass, fused, verify_chain
from orthrus.model.repair import RepairTables
from orthrus.model.slot_cache import SlotCache

MOST_PROMPT_ROWS = 128
"""Longer chunks of a prompt run through the stock layers, which are made for many rows."""


def compile_passes(dual: DualView, on_progress: Progress | None = None) -> None:
    """Run passes as compiled code from now on; raises what goes wrong on the way, and leaves nothing behind.

    Packs the weights, which takes as much memory again, and compiles (seconds the first time, kept in the
    cache folder).
    """
    try:
        _say(on_progress, 0)
        load_kernels()
        compiled = CompiledRunner(dual)
        tables = RepairTables.of(dual)
        dual.accelerate("compiled", compiled, compiled.head, compiled.draft_head, repair_tables=tables)
        _prepare(dual, on_progress)
    except Exception:
        dual.accelerate("eager")
        raise


@torch.inference_mode()
def _prepare(dual: DualView, on_progress: Progress | None) -> None:
    """Compile, or load from the cache folder, all code that passes will need."""
    history, size = 11, dual.config.block_size
    cache = dual.new_cache(history + 5 + size + 101)
    cache.lengths = [history]
    ids_15 = torch.arange(5)[None] % dual.base.config.vocab_size
    passes = [
        verify_chain(ids_15, [history]),
        fused(ids_15, [0, 1, 0, 3], [history], [2], size, dual.mask_token_id),
    ]
    for done, p in enumerate(passes):
        _say(on_progress, 1 + done)
        dual.hidden(p, cache)


def _say(on_progress: Progress | None, done: int) -> None:
    if on_progress is not None:
        on_progress("preparing compiled code (the first time: about a minute)", done, 3)


class CompiledRunner:
    """Stands in for the decoder layers of a model during a pass; see `DualView.accelerate`.

    Passes of one sequence only, and no long chunks of a prompt: others run through the stock layers. The
    weights are packed when it is made; what changes them later is not seen.

    Where the stock forward hands each layer just what the one before it returned, as the first pass shows,
    layers only take note of their call, and the last one runs them all without a way back to Python between;
    unless somebody has hooks on them.
    """

    def __init__(self, dual: DualView) -> None:
        self._dual = dual
        self._layers = list(decoder_layers(dual.base))
        self._code: dict[tuple[int, bool], LayerCode] = {}
        fast = [fast_layer(layer) for layer in self._layers]
        self._compiled = torch.classes.orthrus.Layers([list(named_tensors(layer).values()) for layer in fast])
        kinds: dict[Any, int] = {}
        self._kinds = [kinds.setdefault(kind(layer), i) for i, layer in enumerate(fast)]
        self._examples = {first: fast[first] for first in kinds.values()}
        self.head = fast_linear([dual.base.get_output_embeddings()])
        self.draft_head = None if dual.draft_head is None else fast_linear([dual.draft_head])
        # Built once, since setting up thirty closures a pass would show.
        self._forwards = [self._forward(i) for i in range(len(self._layers))]
        self._chained: bool | None = None
        self._now: _Running | None = None

    @contextmanager
    def __call__(self, p: Pass, cache: SlotCache) -> Iterator[dict[str, Any]]:
        """Answer the calls of the decoder layers for this pass."""
        long_prompt = p.is_prompt and p.num_rows > MOST_PROMPT_ROWS
        # Compiled sizes are at least two, but for the number of rows.
        if p.token_ids_BT.shape[0] != 1 or p.num_slots < 2 or long_prompt:
            with folded_heads(self._dual.base.config, self._dual.device) as more:
                yield more
            return
        # A finished request's cache is to be freed, so all that belongs to a pass ends with it.
        waits = bool(self._chained) and not _hooked(self._layers)
        self._now = now = _Running(p, cache, waits)
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            layer.__dict__["forward"] = forward
        try:
            yield {}
            if now.codes:
                raise RuntimeError("the stock forward has left out the last layer.")
            if self._chained is None:
                self._chained = now.is_chain and now.num_called == len(self._layers)
        finally:
            for layer in self._layers:
                del layer.__dict__["forward"]
            self._now = None

    def _forward(self, index: int) -> Callable[..., Tensor]:
        first_alike, is_last = self._kinds[index], index == len(self._layers) - 1

        def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            now = self._now
            assert now is not None
            now.is_chain &= index == now.num_called and (index == 0 or hidden_states is now.hidden_1TC)
            now.num_called += 1
            if now.waits and not now.is_chain:
                raise RuntimeError("the stock forward has changed its way from layer to layer.")
            arguments, flat = now.arguments(index, hidden_states, kwargs)
            key = first_alike, now.marker is not None
            if key not in self._code:
                self._make(key, arguments)
            now.codes.append(self._code[key])
            now.flat.append(flat)
            now.hidden_1TC = hidden_states
            if now.waits and not is_last:
                return hidden_states
            first = index + 1 - len(now.codes)
            now.hidden_1TC = self._compiled.run(first, now.codes, hidden_states.contiguous(), now.flat)
            now.codes, now.flat = [], []
            return now.hidden_1TC

        return forward

    def _make(self, key: tuple[int, bool], arguments: Arguments) -> None:
        """The code of a kind of layers, when the first of them is called; `_prepare` sees to all."""
        folder, config = cache_dir() / "compiled", self._dual.base.config
        self._code[key] = layer_code(self._examples[key[0]], arguments, folder, config=config)


def _hooked(layers: Sequence[nn.Module]) -> bool:
    """Whether somebody looks at what layers get and return, or changes it."""
    every = torch.nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return True
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


class _Running:
    """One pass on its way through the layers: their codes and arguments as far as they have been called and
    not run; hidden_1TC: what the last one was called with, or has returned; is_chain: whether all were called
    in turn, each with just what the one before it returned. waits: none runs before the last is called."""

    def __init__(self, p: Pass, cache: SlotCache, waits: bool) -> None:
        self.waits = waits
        self._slots_T, self._cache = p.slots_BT[0], cache
        mixed = p.num_ar_rows < p.num_rows
        self.marker = torch.empty(p.num_ar_rows + 1, 0) if mixed else None
        self.codes: list[LayerCode] = []
        self.flat: list[list[Tensor]] = []
        self.hidden_1TC: Tensor | None = None
        self.num_called = 0
        self.is_chain = True
        self._given: dict[tuple[int, ...], tuple[dict[str, Any], list[Tensor], Any]] = {}

    def arguments(
        self, index: int, hidden_1TC: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Arguments, list[Tensor]]:
        """A layer's arguments, and all but the hidden states flattened."""
        # Flattened once for layers that share them; kept themselves, so that nothing else can take their ids.
        key = tuple(map(id, kwargs.values()))
        if key not in self._given:
            given: dict[str, Any] = {n: v for n, v in kwargs.items() if isinstance(v, Tensor | tuple)}
            self._given[key] = given, flatten(given), kwargs
        given, flat, _ = self._given[key]
        keys, values = self._cache.keys[index], self._cache.values[index]
        arguments = Arguments(hidden_1TC, given, self._slots_T, keys, values, self.marker)
        return arguments, arguments.flat(flat)


def compile_problem(dual: DualView) -> str | None:
    """Why compiled code cannot run here; None where it can."""
    if (method := quantisation(dual.base.config)) is not None:
        return f"does not run {method} weights"
    if dual.device.type != "cpu":
        return f"is made for CPUs, and the model is on {dual.device.type}"
    if sys.platform == "win32":
        return "does not run on Windows"
    if not any(shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++") if c):
        return "needs a C++ compiler, and none is on the PATH: install g++ or clang++"
    return None


def fits_twice(dual: DualView) -> bool:
    """Whether there is memory for packed weights beside the stock ones, and for a repair head's tables."""
    num_bytes = sum(t.nbytes for t in (*dual.base.parameters(), *dual.base.buffers()))
    num_bytes += 2 * dual.vocab_size * (dual.config.repair_rank or 0) * dual.dtype.itemsize
    return bool(psutil.virtual_memory().available > 1.2 * num_bytes)
