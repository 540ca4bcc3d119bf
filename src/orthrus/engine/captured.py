"""The captured runner: passes on a GPU as CUDA graphs, recorded once for a shape and replayed.

A small model's pass is some hundred kernels, each shorter than its launch; a replayed graph is one launch.
A graph is made of addresses, so what changes from pass to pass lies in tensors of its own, and it belongs to
the slot cache that it writes: a finished request hands its cache on (`DualView.hand_on`).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from orthrus.model.dual_view import DualView, Masks
from orthrus.model.passes import Pass
from orthrus.model.slot_cache import SlotCache

AR_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Numbers of AR rows that are recorded; passes between two of them are filled up. Blocks are as they are."""
SLOT_STEP = 256
"""Slots that a pass reads, rounded up to whole steps."""

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Runs a function once or more, and gives back how to run it again and the tensor that each run fills."""


def cuda_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record what `run` launches, after a warm-up on a stream aside, as PyTorch's notes on graphs ask for."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


class CapturedRunner:
    """Answers for whole passes of one sequence; see `DualView.accelerate`.

    Others (batches, chunks of a prompt, the last slots before a cache's end) run as they are.
    """

    def __init__(self, dual: DualView, record: Recorder = cuda_graph) -> None:
        self._dual = dual
        self._record = record

    def __call__(self, p: Pass, cache: SlotCache) -> Tensor | None:
        """hidden_BTC of a pass's rows; None where the pass is none of ours, and nothing has been done."""
        num_ar = next((n for n in AR_ROWS if n >= p.num_ar_rows), 0)
        num_slots = p.num_slots + num_ar - p.num_ar_rows
        num_read = min(-(-num_slots // SLOT_STEP) * SLOT_STEP, cache.max_slots)
        if p.token_ids_BT.shape[0] != 1 or not p.num_ar_rows or not num_ar or num_slots > num_read:
            return None
        cache.ensure(num_read)
        filled = filled_up(p, num_ar, num_read)
        key = num_ar, filled.num_rows, num_read
        if key not in cache.recorded:
            cache.recorded[key] = _Recording(self._dual, filled, cache, self._record)
        hidden_1TC = cache.recorded[key](filled)
        return torch.cat([hidden_1TC[:, : p.num_ar_rows], hidden_1TC[:, num_ar:]], dim=1)


class _Recording:
    """One shape of pass over one cache: inputs that stay where they are, and what is recorded of them."""

    def __init__(self, dual: DualView, p: Pass, cache: SlotCache, record: Recorder) -> None:
        self._dual, self._cache = dual, cache
        tensors = ("token_ids_BT", "position_ids_BT", "slots_BT", "visible_BTS")
        self._pass = replace(p, **{name: getattr(p, name).clone() for name in tensors})
        cache.begin(self._pass)
        self._masks = _copies(dual.masks(self._pass, cache))
        self._replay, self._hidden_1TC = record(self._run)

    def _run(self) -> Tensor:
        with self._dual.split.at(self._pass.num_ar_rows):
            return self._dual.decode(self._pass, self._cache, self._masks)

    def __call__(self, p: Pass) -> Tensor:
        ours = self._pass
        for static, new in (
            (ours.token_ids_BT, p.token_ids_BT),
            (ours.position_ids_BT, p.position_ids_BT),
            (ours.slots_BT, p.slots_BT),
            (ours.visible_BTS, p.visible_BTS),
        ):
            static.copy_(new)
        self._cache.begin(ours)
        masks = self._dual.masks(ours, self._cache)
        for static, new in zip(_leaves(self._masks), _leaves(masks), strict=True):
            static.copy_(new)
        self._replay()
        return self._hidden_1TC


def filled_up(p: Pass, num_ar: int, num_slots: int) -> Pass:
    """The same pass with `num_ar` AR rows, reading `num_slots`.

    The rows that are put behind its own AR rows write the slots behind its last one; nobody sees them, and
    they see nothing but themselves.
    """
    first, extra = p.num_ar_rows, num_ar - p.num_ar_rows
    slots_E = torch.arange(p.num_slots, p.num_slots + extra, device=p.slots_BT.device)
    own_ES = torch.arange(num_slots, device=p.slots_BT.device) == slots_E[:, None]
    visible_1TS = pad(p.visible_BTS, (0, num_slots - p.num_slots))

    def filled(rows: Tensor, more: Tensor) -> Tensor:
        return torch.cat([rows[:, :first], more[None], rows[:, first:]], dim=1)

    return Pass(
        token_ids_BT=filled(p.token_ids_BT, p.token_ids_BT.new_zeros(extra)),
        position_ids_BT=filled(p.position_ids_BT, p.position_ids_BT[0, :1].expand(extra)),
        slots_BT=filled(p.slots_BT, slots_E),
        visible_BTS=filled(visible_1TS, own_ES),
        num_ar_rows=num_ar,
        logit_rows_R=p.logit_rows_R,
        block_size=p.block_size,
    )


def _leaves(masks: Masks) -> list[Tensor]:
    return list(masks.values()) if isinstance(masks, dict) else [masks]


def _copies(masks: Masks) -> Masks:
    if isinstance(masks, dict):
        return {name: mask.clone() for name, mask in masks.items()}
    return masks.clone()
