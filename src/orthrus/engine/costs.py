"""What passes cost on this machine: measured once for a model and precision, kept on disk."""

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from weakref import WeakKeyDictionary

import torch

from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import cpu_model, installed_version
from orthrus.base.storage import cache_dir
from orthrus.decoding.policy import CostTable
from orthrus.engine.probe import synchronize
from orthrus.errors import StorageError
from orthrus.model.dual_view import DualView
from orthrus.model.passes import verify_chain

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
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
    """Time AR passes of each number of rows after 128 tokens of history; the least of several rounds."""
    cache = dual.new_cache(HISTORY + max(ROWS))
    ids_1T = torch.arange(HISTORY, device=dual.device)[None] % dual.base.config.vocab_size
    dual.run(verify_chain(ids_1T, [0]), cache)
    cache.commit(HISTORY)
    passes = {n: verify_chain(ids_1T[:, :n], [HISTORY]) for n in ROWS}
    body, head = dict.fromkeys(ROWS, float("inf")), dict.fromkeys(ROWS, float("inf"))
    for done in range(REPEATS + 1):
        if on_measure is not None:
            on_measure(done, REPEATS + 1)
        for n, p in passes.items():
            started = _now(dual)
            hidden_TC = dual.hidden(p, cache)[0]
            middle = _now(dual)
            dual.head(hidden_TC)
            ended = _now(dual)
            # The first round warms up.
            if done:
                body[n] = min(body[n], (middle - started) * 1e3)
                head[n] = min(head[n], (ended - middle) * 1e3)
    return CostTable(ROWS, _ascending(body), _ascending(head))


def _ascending(values: dict[int, float]) -> tuple[float, ...]:
    """More rows never cost less: what says so is noise."""
    least = float("inf")
    kept = []
    for value in reversed(values.values()):
        least = min(least, value)
        kept.append(least)
    return tuple(reversed(kept))


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
        "view": [dual.config.layers, dual.config.twins, dual.config.rank],
        "dtype": str(dual.dtype),
        "attention": config._attn_implementation,
        "runner": [dual.runner, dual.precision, dual.draft_precision],
    }


def _file(dual: DualView) -> Path:
    digest = hashlib.sha256(json.dumps(_key(dual), sort_keys=True).encode()).hexdigest()
    return cache_dir() / "costs" / f"{digest[:24]}.json"


def _read(file: Path) -> CostTable | None:
    """A stored table; None where there is none that can be used."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return CostTable(tuple(raw["rows"]), tuple(raw["body_ms"]), tuple(raw["head_ms"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
