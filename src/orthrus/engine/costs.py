"""What passes cost on this machine: measured once for a model and precision, kept on disk."""

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, fields
from itertools import accumulate
from math import inf
from pathlib import Path
from time import perf_counter
from weakref import WeakKeyDictionary

import torch

from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import cpu_model, installed_version
from orthrus.base.storage import cache_dir
from orthrus.config import SamplingParams
from orthrus.decoding.policy import CostTable
from orthrus.decoding.processors import LogitRules
from orthrus.engine.layer_code import sources_digest
from orthrus.engine.probe import synchronize
from orthrus.engine.state import DecodeState
from orthrus.errors import StorageError
from orthrus.model.attention import MOST_FOLDED_ROWS
from orthrus.model.dual_view import DualView
from orthrus.model.passes import fused, verify_chain
from orthrus.model.slot_cache import SlotCache

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
BLOCKS, BESIDE = (1, 2, 3, 4), 8
"""Numbers of blocks that are timed, beside that many AR rows."""
HISTORY = 128
REPEATS = 5

OnMeasure = Callable[[int, int], None]
"""Called with (rounds done, rounds in all) while passes are timed."""

_known: "WeakKeyDictionary[DualView, CostTable]" = WeakKeyDictionary()


def pass_costs(dual: DualView, on_measure: OnMeasure | None = None) -> CostTable:
    """The cost table of this model here: from memory, from the cache, or measured now (a few seconds)."""
    if dual not in _known:
        file = _file(dual)
        table = _read(file)
        if table is None:
            table = measure_costs(dual, on_measure)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text_atomic(file, json.dumps(asdict(table) | {"key": _key(dual)}, indent=2) + "\n")
            except (StorageError, OSError):
                # A machine without a writable cache measures again next time.
                pass
        _known[dual] = table
    return _known[dual]


@torch.inference_mode()
def measure_costs(dual: DualView, on_measure: OnMeasure | None = None) -> CostTable:
    """Time passes of several numbers of rows after 128 tokens of history; the least of several rounds.

    Block rows are timed as what they add to a pass of a few AR rows.
    """
    size = dual.config.block_size
    cache = dual.new_cache(HISTORY + max(ROWS) + max(BLOCKS) * size)
    state = _state(dual, cache)
    ids_1T = torch.arange(HISTORY, device=dual.device)[None] % dual.base.config.vocab_size
    dual.run(verify_chain(ids_1T, [0]), cache)
    cache.commit(HISTORY)
    passes = {(n, 0): verify_chain(ids_1T[:, :n], [HISTORY]) for n in ROWS}
    beside_1T, chain = ids_1T[:, :BESIDE], range(BESIDE - 1)
    # Larger passes run through other code; two are needed to tell what a row costs.
    blocks = [m for m in BLOCKS if m < 3 or BESIDE + m * size <= MOST_FOLDED_ROWS]
    for m in blocks:
        passes[BESIDE, m] = fused(beside_1T, chain, [HISTORY], range(m), size, dual.mask_token_id)
    body, head, draft = (dict.fromkeys(passes, inf) for _ in range(3))
    for done in range(REPEATS + 1):
        if on_measure is not None:
            on_measure(done, REPEATS + 1)
        for key, p in passes.items():
            clock = [_now(dual)]
            hidden_TC = dual.hidden(p, cache)[0]
            clock.append(_now(dual))
            logits_TV = dual.head(hidden_TC)
            state.choose(logits_TV, range(len(hidden_TC)), [()] * len(hidden_TC))
            clock.append(_now(dual))
            state.propose(hidden_TC, HISTORY, logits_TV if dual.draft_head is None else None)
            clock.append(_now(dual))
            # The first round warms up.
            if done:
                for table, start, end in zip((body, head, draft), clock, clock[1:], strict=False):
                    table[key] = min(table[key], (end - start) * 1e3)
    rows = [(n, 0) for n in ROWS]
    alone = body[BESIDE, 0]
    return CostTable(
        rows=ROWS,
        body_ms=_ascending([body[key] for key in rows]),
        head_ms=_ascending([head[key] for key in rows]),
        draft_ms=_ascending([draft[key] for key in rows]),
        block_rows=tuple(m * size for m in blocks),
        block_ms=_ascending([max(0.0, body[BESIDE, m] - alone) for m in blocks]),
    )


def _state(dual: DualView, cache: SlotCache) -> DecodeState:
    """A greedy request without rules, to time what comes after the layers."""
    sampling = SamplingParams()
    return DecodeState(
        dual=dual,
        cache=cache,
        sampling=sampling,
        seed=0,
        rules=LogitRules(sampling, dual.vocab_size, dual.device),
        block_size=dual.config.block_size,
        floor=True,
        context_length=cache.num_slots,
    )


def _ascending(values: list[float]) -> tuple[float, ...]:
    """More rows never cost less: what says so is noise."""
    return tuple(accumulate(reversed(values), min))[::-1]


def _now(dual: DualView) -> float:
    synchronize(dual.device)
    return perf_counter()


def _key(dual: DualView) -> dict[str, object]:
    """All that a cost may depend on."""
    config = dual.base.config
    on_gpu = dual.device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(dual.device) if on_gpu else cpu_model() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": [installed_version(name) for name in ("orthrus", "torch", "transformers")],
        "base": dual.config.base_fingerprint or config.to_json_string(),
        "view": [dual.config.layers, dual.config.twins, dual.config.rank, dual.config.block_size],
        "dtype": str(dual.dtype),
        "attention": config._attn_implementation,
        "runner": [dual.runner, dual.precision, dual.draft_precision, sources_digest()],
    }


def _file(dual: DualView) -> Path:
    digest = hashlib.sha256(json.dumps(_key(dual), sort_keys=True).encode()).hexdigest()
    return cache_dir() / "costs" / f"{digest[:24]}.json"


def _read(file: Path) -> CostTable | None:
    """A stored table; None where there is none that can be used."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return CostTable(**{field.name: tuple(raw[field.name]) for field in fields(CostTable)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
