"""What passes cost on this machine: measured once for a model and precision, kept on disk."""

import hashlib
import json
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import median
from time import perf_counter
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
TABLE_VERSION = 9
"""Of what a stored table means: raised when passes come to do more, or less, beside their layers."""
TREE = 24
"""Nodes of the tree whose making is timed with a draft's."""
PLAIN_RUN = 3
"""Passes of one row that run before a round's others."""
REPEATS, ENOUGH = 5, 10
"""Rounds of the first measurement, and in all, of which each later start adds one: a machine that was busy
when it was timed shows its true costs in the next starts."""

OnMeasure = Callable[[int, int], None]
"""Called with (rounds done, rounds in all) while passes are timed."""

Round = dict[str, float]
"""Milliseconds of what is timed: `body 8+16` of 8 AR rows and 16 block rows, `head 8`, `draft`."""

_known: "WeakKeyDictionary[DualView, dict[bool, CostTable]]" = WeakKeyDictionary()


def pass_costs(dual: DualView, on_measure: OnMeasure | None = None, *, greedy: bool = True) -> CostTable:
    """The cost table of this model here: from memory, from the cache, or measured now (a few seconds).

    The first starts after that add a round each. Sampled decoding has a table of its own, since drawing a
    token costs more than taking the best.
    """
    known = _known.setdefault(dual, {})
    if greedy not in known:
        key = _key(dual, greedy)
        file = _file(key)
        rounds = _read(file)
        if len(rounds) < ENOUGH:
            repeats = 1 if rounds else REPEATS
            rounds = rounds + time_rounds(dual, on_measure, greedy=greedy, repeats=repeats)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text_atomic(file, json.dumps({"key": key, "rounds": rounds}, indent=1) + "\n")
            except (StorageError, OSError):
                # A machine without a writable cache measures again next time.
                pass
        known[greedy] = cost_table(rounds)
    return known[greedy]


def cost_table(rounds: Sequence[Round]) -> CostTable:
    """The table of timed rounds, all of the same passes: medians, of rounds brought to one speed.

    A machine that drifts slows all passes of a round alike; that cancels. The least of each pass would not
    do: a plain pass, which waits for memory, has more to gain from a quiet moment than one of many rows.
    """
    usual = {name: median(each[name] for each in rounds) for name in rounds[0]}
    speeds = [median(each[name] / ms for name, ms in usual.items() if ms > 0.0) for each in rounds]
    pairs = list(zip(rounds, speeds, strict=True))
    ms = {name: median(each[name] / speed for each, speed in pairs) for name in usual}
    bodies = [tuple(map(int, name[5:].split("+"))) for name in ms if name.startswith("body ")]
    rows = sorted(n for n, block in bodies if not block)
    draft_rows = sorted(block for n, block in bodies if n == 1 and block)
    block_rows = sorted(block for n, block in bodies if n == BESIDE and block)
    alone_ms = ms[f"body {BESIDE}+0"]
    return CostTable(
        rows=tuple(rows),
        body_ms=_ascending([ms[f"body {n}+0"] for n in rows]),
        head_ms=_ascending([ms[f"head {n}"] for n in rows]),
        block_rows=tuple(block_rows),
        block_ms=_ascending([max(0.0, ms[f"body {BESIDE}+{n}"] - alone_ms) for n in block_rows]),
        draft_rows=tuple(draft_rows),
        draft_pass_ms=_ascending([ms[f"body 1+{n}"] for n in draft_rows]),
        draft_ms=ms["draft"],
    )


@torch.inference_mode()
def time_rounds(
    dual: DualView, on_measure: OnMeasure | None = None, *, greedy: bool = True, repeats: int = REPEATS
) -> list[Round]:
    """Time passes of several numbers of rows after `HISTORY` tokens, in several rounds; one more warms up.

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
    num_guesses = max(1, dual.config.num_guesses(size))
    num_rounds = repeats + 1
    rounds = []
    for done in range(num_rounds):
        if on_measure is not None:
            on_measure(done, num_rounds)
        clock = _Clock(dual)
        # A plain pass follows plain passes, which leave its weights in the caches; others take turns.
        for (n, block), p in [next(iter(passes.items()))] * PLAIN_RUN + list(passes.items()):
            with clock(f"body {n}+{block}"):
                hidden_TC = dual.hidden(p, cache)[0]
            if not block:
                with clock(f"head {n}"):
                    logits_TV = dual.head(hidden_TC)
                    # Rows of a tree share positions, and noise once made is kept.
                    positions = [HISTORY + 1 + i % size for i in range(len(hidden_TC))]
                    state.choose(logits_TV, positions, [()] * len(hidden_TC))
        with clock("draft"):
            joint_DV = None if dual.draft_head is not None else logits_TV[:num_guesses]
            # And what comes with one: a tree, the pass that verifies it, an accepted path to be gathered.
            drafts = state.propose(hidden_TC[:num_guesses], HISTORY + 1, joint_DV)
            tree = best_first_tree(drafts, TREE)
            verify_tree(ids_1T[:, : 1 + tree.num_nodes], tree.parents, [HISTORY])
            cache.compact(sorted({HISTORY, HISTORY + tree.num_nodes}))
        cache.lengths = [HISTORY]
        rounds.append(clock.round())
    return rounds[1:]


class _Clock:
    """The times of each part of a round, in ms."""

    def __init__(self, dual: DualView) -> None:
        self._dual = dual
        self._times: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronize(self._dual.device)
        start = perf_counter()
        yield
        synchronize(self._dual.device)
        self._times[name].append((perf_counter() - start) * 1e3)

    def round(self) -> Round:
        """What was timed more than once counts once: plain passes, of which the first follow others."""
        return {name: median(times) for name, times in self._times.items()}


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
        "versions": [installed_version(name) for name in ("orthrus-lm", "torch", "transformers")],
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


def _read(file: Path) -> list[Round]:
    """Stored rounds; none where there are none that can be used."""
    try:
        rounds = json.loads(file.read_text(encoding="utf-8"))["rounds"]
        rounds = [{str(name): float(ms) for name, ms in each.items()} for each in rounds]
        # Raises where something is missing.
        cost_table(rounds)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        return []
    return rounds
