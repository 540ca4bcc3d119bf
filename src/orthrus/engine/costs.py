"""What passes cost on this machine: measured once for a model and precision, kept on disk."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import accumulate
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch

from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import cpu_model, installed_version
from orthrus.base.storage import cache_dir
from orthrus.config import SamplingParams
from orthrus.decoding.cost_table import CostTable
from orthrus.decoding.tree import best_first_tree
from orthrus.engine.layer_code import sources_digest
from orthrus.engine.probe import synchronize
from orthrus.engine.state import timed_request
from orthrus.errors import StorageError
from orthrus.model.attention import MOST_FOLDED_ROWS
from orthrus.model.dual_view import DualView
from orthrus.model.passes import fused, verify_chain, verify_tree

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
BLOCKS, BESIDE = (1, 2, 3, 4), 8
"""Numbers of blocks that are timed, beside that many AR rows."""
DRAFT_ROWS = (2, 4, 6, 8, 12, 16, 24, 32)
"""Rows of a block that is drafted alone, as far as blocks go, and one as long as they go."""
HISTORY = 256
"""Committed tokens that timed passes read: about as many as in the middle of an answer."""
TABLE_VERSION = 8
"""Of what a stored table means: raised when passes come to do more, or less, beside their layers."""
TREE = 24
"""Nodes of the tree whose making is timed with a draft's."""
PLAIN_RUN = 3
"""Passes of one row that run before a round's others."""
REPEATS, ENOUGH = 5, 10
"""Rounds of the first measurement, and in all, of which each later start adds one: a machine that was busy
when it was timed shows its true costs in one of the next starts."""

OnMeasure = Callable[[int, int], None]
"""Called with (rounds done, rounds in all) while passes are timed."""

_known: "WeakKeyDictionary[DualView, dict[bool, CostTable]]" = WeakKeyDictionary()


def pass_costs(dual: DualView, on_measure: OnMeasure | None = None, *, greedy: bool = True) -> CostTable:
    """The cost table of this model here: from memory, from the cache, or measured now (a few seconds).

    The first starts after that add a round each, for the least of all. Sampled decoding has a
    table of its own, since drawing a token costs more than taking the best.
    """
    known = _known.setdefault(dual, {})
    if greedy not in known:
        key = _key(dual, greedy)
        file = _file(key)
        table, num_rounds = _read(file)
        if num_rounds < ENOUGH:
            repeats = 1 if num_rounds else REPEATS
            new = measure_costs(dual, on_measure, greedy=greedy, repeats=repeats)
            table = new if table is None else _least(table, new)
            stored = asdict(table) | {"num_rounds": num_rounds + repeats, "key": key}
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text_atomic(file, json.dumps(stored, indent=2) + "\n")
            except (StorageError, OSError):
                # A machine without a writable cache measures again next time.
                pass
        assert table is not None
        known[greedy] = table
    return known[greedy]


@torch.inference_mode()
def measure_costs(
    dual: DualView, on_measure: OnMeasure | None = None, *, greedy: bool = True, repeats: int = REPEATS
) -> CostTable:
    """Time passes of several numbers of rows after `HISTORY` tokens; the least of several rounds.

    One more warms up before them; a single round is compared with earlier ones, and needs none.

    Block rows are timed as what they add to a pass of a few AR rows, and in draft passes of one AR row.
    Sampled means temperature 1 without filters.
    """
    size = dual.config.block_size
    cache = dual.new_cache(HISTORY + max(ROWS) + max(BLOCKS) * size)
    sampling = SamplingParams(temperature=0.0 if greedy else 1.0)
    state = timed_request(dual, cache, sampling, cache.num_slots)
    ids_1T = torch.arange(HISTORY, device=dual.device)[None] % dual.base.config.vocab_size
    dual.run(verify_chain(ids_1T, [0]), cache)
    cache.commit(HISTORY)
    passes = {(n, 0): verify_chain(ids_1T[:, :n], [HISTORY]) for n in ROWS}
    beside_1T, chain = ids_1T[:, :BESIDE], range(BESIDE - 1)
    # Larger passes run through other code; two are needed to tell what a row costs.
    blocks = [m for m in BLOCKS if m < 3 or BESIDE + m * size <= MOST_FOLDED_ROWS]
    for m in blocks:
        passes[BESIDE, m * size] = fused(beside_1T, chain, [HISTORY], range(m), size, dual.mask_token_id)
    # Two of them at least, to tell what a row costs.
    draft_rows = sorted({min(2, size - 1), *(n for n in DRAFT_ROWS if n < size), size})
    for n in draft_rows:
        passes[1, n] = fused(ids_1T[:, :1], [], [HISTORY], [0], n, dual.mask_token_id)
    clock = _Clock(dual)
    num_guesses = max(1, dual.config.num_guesses(size))
    num_rounds = repeats + int(repeats > 1)
    for done in range(num_rounds):
        if on_measure is not None:
            on_measure(done, num_rounds)
        clock.counts = done >= num_rounds - repeats
        # A plain pass follows plain passes, which leave its weights in the caches; others take turns.
        for key, p in [next(iter(passes.items()))] * PLAIN_RUN + list(passes.items()):
            with clock("body", key):
                hidden_TC = dual.hidden(p, cache)[0]
            if not key[1]:
                with clock("head", key):
                    logits_TV = dual.head(hidden_TC)
                    # Rows of a tree share positions, and noise once made is kept.
                    positions = [HISTORY + 1 + i % size for i in range(len(hidden_TC))]
                    state.choose(logits_TV, positions, [()] * len(hidden_TC))
        with clock("draft", (1, 0)):
            joint_DV = None if dual.draft_head is not None else logits_TV[:num_guesses]
            # And what comes with one: a tree, the pass that verifies it, an accepted path to be gathered.
            drafts = state.propose(hidden_TC[:num_guesses], HISTORY + 1, joint_DV)
            tree = best_first_tree(drafts, TREE)
            verify_tree(ids_1T[:, : 1 + tree.num_nodes], tree.parents, [HISTORY])
            cache.compact(sorted({HISTORY, HISTORY + tree.num_nodes}))
        cache.lengths = [HISTORY]
    least = clock.least
    alone = least["body", (BESIDE, 0)]
    return CostTable(
        rows=ROWS,
        body_ms=_ascending([least["body", (n, 0)] for n in ROWS]),
        head_ms=_ascending([least["head", (n, 0)] for n in ROWS]),
        block_rows=tuple(m * size for m in blocks),
        block_ms=_ascending([max(0.0, least["body", (BESIDE, m * size)] - alone) for m in blocks]),
        draft_rows=tuple(draft_rows),
        draft_pass_ms=_ascending([least["body", (1, n)] for n in draft_rows]),
        draft_ms=least["draft", (1, 0)],
    )


def _least(a: CostTable, b: CostTable) -> CostTable:
    """What one would have measured in the rounds of both tables together."""
    body_ms = tuple(map(min, a.body_ms, b.body_ms))
    beside = ROWS.index(BESIDE)
    # What blocks add is a difference: the least of the passes with blocks counts, not of the differences.
    mixed_ms = ([ms + t.body_ms[beside] for ms in t.block_ms] for t in (a, b))
    return CostTable(
        rows=a.rows,
        body_ms=body_ms,
        head_ms=tuple(map(min, a.head_ms, b.head_ms)),
        block_rows=a.block_rows,
        block_ms=tuple(max(0.0, min(pair) - body_ms[beside]) for pair in zip(*mixed_ms, strict=True)),
        draft_rows=a.draft_rows,
        draft_pass_ms=tuple(map(min, a.draft_pass_ms, b.draft_pass_ms)),
        draft_ms=min(a.draft_ms, b.draft_ms),
    )


class _Clock:
    """The least time of each part of each pass, in ms, over the rounds that count."""

    def __init__(self, dual: DualView) -> None:
        self._dual = dual
        self.counts = False
        self.least: dict[tuple[str, tuple[int, int]], float] = {}

    @contextmanager
    def __call__(self, part: str, key: tuple[int, int]) -> Iterator[None]:
        synchronize(self._dual.device)
        start = perf_counter()
        yield
        synchronize(self._dual.device)
        if self.counts:
            ms = (perf_counter() - start) * 1e3
            self.least[part, key] = min(ms, self.least.get((part, key), inf))


def _ascending(values: list[float]) -> tuple[float, ...]:
    """More rows never cost less: what says so is noise."""
    return tuple(accumulate(reversed(values), min))[::-1]


def _key(dual: DualView, greedy: bool) -> dict[str, object]:
    """All that a cost may depend on."""
    config = dual.base.config
    on_gpu = dual.device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(dual.device) if on_gpu else cpu_model() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": [installed_version(name) for name in ("orthrus", "torch", "transformers")],
        "base": dual.config.base_fingerprint or config.to_json_string(),
        "view": [dual.config.layers, dual.config.twins, dual.config.rank, dual.config.block_size],
        "repair": dual.config.repair_rank,
        "greedy": greedy,
        "table": TABLE_VERSION,
        "dtype": str(dual.dtype),
        "attention": config._attn_implementation,
        "drafts": [dual.draft_precision, None if dual.draft_ids_N is None else len(dual.draft_ids_N)],
        "runner": [dual.runner, dual.precision, sources_digest()],
    }


def _file(key: dict[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "costs" / f"{digest[:24]}.json"


def _read(file: Path) -> tuple[CostTable | None, int]:
    """A stored table and the rounds it comes from; none and 0 where there is none that can be used."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        found: dict[str, Any] = {}
        for field in fields(CostTable):
            value = raw[field.name]
            found[field.name] = tuple(value) if isinstance(value, list) else float(value)
        return CostTable(**found), int(raw["num_rounds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, 0
