"""The compiled runner: decoder layers as code that is compiled for this CPU, over packed weights, and kept on disk.

The stock forward runs everything but the layers; a copy of its structure calls compiled code in their place. All layers
of a kind share one code, and its sizes are open. So compiling takes half a minute or more, once.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orthrus.base.families import decoder_layers
from orthrus.base.memory import available_bytes
from orthrus.base.quantised import quantisation
from orthrus.base.storage import Progress
from orthrus.engine.fast_layers import fast_layer
from orthrus.engine.layer_code import Arguments, LayerCode, flatten, kind, layer_code, named_tensors
from orthrus.errors import UnsupportedModelError, UserInputError
from orthrus.kernels.build import load_kernels
from orthrus.kernels.linear import fast_linear
from orthrus.model.drafting import RepairTables
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass, join, tree
from orthrus.model.pool import SlotPool, Slots
from orthrus.model.runner import no_mask
from orthrus.model.shadow import shadow


class CompiledRunner:
    """Runs passes on a CPU as compiled code; see `orthrus.model.runner.Runner`.

    A row comes out equal to the last bit in any pass: alone, beside other rows or other requests, in a prompt's chunk
    or in a tree. The runner packs the weights when it is made, which takes as much memory again. Later changes of the
    weights have no effect. Hooks on the model's layers are not called.

    on_progress: called only while code is compiled that the cache folder does not have. Raises the compiler's errors,
    and UnsupportedModelError if the stock forward does more between two layers than to pass on the result.
    """

    name = "compiled"

    def __init__(self, dual: DualView, on_progress: Progress | None = None) -> None:
        load_kernels(on_progress)
        self.dual, self._dtype = dual, dual.dtype
        self.kv_dtype = torch.bfloat16 if dual.precision else dual.dtype
        self.repair_tables = RepairTables.of(dual)
        layers = list(decoder_layers(dual.base))
        fast = [fast_layer(layer) for layer in layers]
        self._layers = torch.classes.orthrus.Layers([list(named_tensors(layer).values()) for layer in fast])
        kinds: dict[Any, int] = {}
        self._kinds = [kinds.setdefault(kind(layer), i) for i, layer in enumerate(fast)]
        self._examples = {first: fast[first] for first in kinds.values()}
        self._code: dict[tuple[int, bool], LayerCode] = {}
        self._head = fast_linear([dual.base.get_output_embeddings()])
        self._draft_head = None if dual.draft_head is None else fast_linear([dual.draft_head])
        stand_ins = nn.ModuleList([_StandIn(i, len(layers)) for i in range(len(layers))])
        self._decoder = _with_layers(dual, stand_ins)
        self._no_mask = no_mask(dual)
        self._prepare(on_progress)

    def new_pool(self, num_pages: int) -> SlotPool:
        return SlotPool(
            self.dual.base.config,
            num_pages,
            dtype=self.kv_dtype,
            move=torch.ops.orthrus.move_slots,
            keys_transposed=True,
        )

    def hidden(self, p: Pass, pool: SlotPool) -> Tensor:
        return self._decode(p, _Calls(self._run_layers, p, pool))

    def head(self, hidden_RC: Tensor, *, drafts: bool = False) -> Tensor:
        head = self._draft_head if drafts and self._draft_head is not None else self._head
        if head is None or (drafts and self.dual.draft_head is not None and self._draft_head is None):
            return self.dual.head(hidden_RC, drafts=drafts)
        return self.dual.finished(head(hidden_RC), drafts=drafts)

    def _decode(self, p: Pass, calls: "_Calls") -> Tensor:
        hidden_1RC = self.dual.embed(p.token_ids_R[None], has_masks=p.num_ar_rows < p.num_rows)
        dtype, device = hidden_1RC.dtype, hidden_1RC.device
        if dtype != self._dtype or device.type != "cpu":
            # Compiled code does not check types.
            raise UserInputError(
                f"the model was moved to {str(dtype).removeprefix('torch.')} on {device} after its passes had been "
                "compiled: load it that way, or with runner='eager'."
            )
        out = self._decoder(
            inputs_embeds=hidden_1RC,
            attention_mask=self._no_mask,
            position_ids=p.position_ids_R[None],
            use_cache=False,
            calls=calls,
        )
        hidden_RC: Tensor = out.last_hidden_state[0]
        return hidden_RC

    def _run_layers(self, calls: "_Calls", hidden_1RC: Tensor) -> Tensor:
        """Run all layers by one call, without returning to Python between them."""
        p, pool = calls.pass_, calls.pool
        mixed = p.num_ar_rows < p.num_rows
        codes = [self._code[first, mixed] for first in self._kinds]
        rest = [p.plan_P, torch.empty(p.num_ar_rows + 1, 0)] if mixed else [p.plan_P]
        out: Tensor = self._layers.run(
            0, codes, hidden_1RC.contiguous(), calls.flat, p.slots_R, pool.keys, pool.values, rest
        )
        return out

    @torch.inference_mode()
    def _prepare(self, on_progress: Progress | None) -> None:
        """Record how the stock forward calls its layers, and compile their code or load it from the cache folder."""
        pool, size = self.new_pool(3), self.dual.config.block_size
        slots = Slots(pool)
        slots.reserve(11 + 5 + size)
        slots.commit(11)
        ids = [i % self.dual.base.config.vocab_size for i in range(5)]
        mask_token_id = self.dual.mask_token_id
        for part in (tree(ids, [0, 1, 0, 3]), tree(ids, [0, 1, 0, 3], [2], size, mask_token_id)):
            p = join([(part, slots)])
            seen = _Calls(lambda _, hidden: hidden, p, pool)
            self._decode(p, seen)
            if seen.num_called != len(self._kinds):
                raise UnsupportedModelError(
                    "the stock forward of this model leaves out layers: run it eagerly."
                )
            for first, layer in self._examples.items():
                given = seen.given[first]
                hidden_1RC = self.dual.embed(p.token_ids_R[None])
                marker = torch.empty(p.num_ar_rows + 1, 0) if p.num_ar_rows < p.num_rows else None
                stores = pool.keys[first], pool.values[first]
                arguments = Arguments(hidden_1RC, given, p.slots_R, *stores, p.plan_P, marker)
                self._code[first, marker is not None] = layer_code(
                    layer, arguments, config=self.dual.base.config, progress=on_progress
                )
        if len({id(given) for given in seen.given}) == 1:
            # One module stands for all layers, because thirty calls of modules would cost noticeable time.
            self._decoder = _with_layers(self.dual, _Stack(len(self._kinds)))


def _with_layers(dual: DualView, layers: nn.Module) -> nn.Module:
    """The stock decoder with another module in place of its layers. The rest is shared."""
    return shadow(dual.base.get_decoder(), lambda path, _: layers if path == "layers" else None)


class _Calls:
    """The arguments of one pass's layers.

    given: for each layer, the tensors (or tuples of them) that its stock forward gets by name. flat: the same as lists;
    a single list serves all layers if all get the same arguments.
    """

    def __init__(self, run: Callable[["_Calls", Tensor], Tensor], p: Pass, pool: SlotPool) -> None:
        self.run, self.pass_, self.pool = run, p, pool
        self.given: list[dict[str, Any]] = []
        self.flat: list[list[Tensor]] = []
        self.num_called = 0
        self._hidden_1RC: Tensor | None = None
        self._known: dict[tuple[int, ...], tuple[dict[str, Any], list[Tensor], Any]] = {}

    def take(self, index: int, hidden_1RC: Tensor, kwargs: dict[str, Any]) -> None:
        """Record the call of a layer, or of all layers at once. Each must get the result of the one before."""
        if index != self.num_called or (index and hidden_1RC is not self._hidden_1RC):
            raise UnsupportedModelError(
                "the stock forward of this model does more than to call its layers in turn: run it eagerly."
            )
        self.num_called += 1
        self._hidden_1RC = hidden_1RC
        # Arguments that layers share are flattened once. They are kept, so that no other object can get their ids.
        key = tuple(map(id, kwargs.values()))
        if key not in self._known:
            given: dict[str, Any] = {
                n: v for n, v in kwargs.items() if isinstance(v, Tensor | tuple) and n != "attention_mask"
            }
            self._known[key] = given, flatten(given), kwargs
        given, flat, _ = self._known[key]
        self.given.append(given)
        self.flat.append(flat)


class _StandIn(nn.Module):
    """A stand-in for one layer, which records its call. The last one runs all layers."""

    def __init__(self, index: int, num_layers: int) -> None:
        super().__init__()
        self._index, self._num_layers = index, num_layers

    def forward(self, hidden_states: Tensor, *, calls: _Calls, **kwargs: Any) -> Tensor:
        calls.take(self._index, hidden_states, kwargs)
        return calls.run(calls, hidden_states) if self._index == self._num_layers - 1 else hidden_states


class _Stack(nn.ModuleList):
    """A list of layers with a single element, whose call runs all layers."""

    def __init__(self, num_layers: int) -> None:
        super().__init__([_StandIn(0, 1)])
        self._every = range(num_layers)

    def __getitem__(self, index: Any) -> Any:
        if self._every[index] != self._every:
            raise UnsupportedModelError("the stock forward of this model leaves out layers: run it eagerly.")
        return self


def compile_problem(dual: DualView) -> str | None:
    """The reason why this model or machine is not supported, or None.

    It completes a sentence that begins with "the compiled runner". So do the results of the next two functions.
    """
    if (method := quantisation(dual.base.config)) is not None:
        return f"does not run {method} weights"
    if any(type(module).__module__.partition(".")[0] == "peft" for module in dual.base.modules()):
        return "does not run adapters of PEFT"
    if dual.dtype not in (torch.float32, torch.bfloat16):
        return f"does not compute in {str(dual.dtype).removeprefix('torch.')}"
    if dual.device.type != "cpu":
        return f"is made for CPUs, and the model is on {dual.device.type}"
    machine = platform.machine()
    if sys.platform != "linux" or machine.lower() not in ("x86_64", "amd64"):
        # Other platforms may work, but nobody has run the tests there yet.
        return f"is made for x86-64 Linux only, and this is {platform.system() or sys.platform} on {machine}"
    return None


def compiler_problem() -> str | None:
    """The reason why there is no compiler to use, or None."""
    if any(shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++") if c):
        return None
    return "needs a C++ compiler, and none is on the PATH: install g++ or clang++"


def memory_problem(dual: DualView) -> str | None:
    """The reason if memory is too small for packed weights beside the stock ones, and a repair head's tables."""
    num_bytes = sum(t.nbytes for t in (*dual.base.parameters(), *dual.base.buffers()))
    num_bytes += 2 * dual.vocab_size * (dual.config.repair_rank or 0) * dual.dtype.itemsize
    needed, available = 1.2 * num_bytes, available_bytes()
    if available > needed:
        return None
    return (
        f"keeps the weights twice and needs {needed / 1e9:.1f} GB more, and {available / 1e9:.1f} GB of "
        "memory are free: free some, or choose a smaller dtype"
    )
