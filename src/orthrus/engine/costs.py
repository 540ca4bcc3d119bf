"""Measures the cost of passes on this machine, once for each model and precision, and keeps it on disk."""

import hashlib
import json
import math
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.base.devices import synchronize
from orthrus.base.json_text import parse_json
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import cpu_model, installed_version
from orthrus.base.storage import cache_dir
from orthrus.config import DecodeConfig, SamplingParams
from orthrus.decoding.cost_table import CostTable
from orthrus.decoding.policy import Policy
from orthrus.decoding.prices import Prices
from orthrus.decoding.processors import LogitRules
from orthrus.decoding.stopping import StopRules
from orthrus.decoding.tree import best_first_tree
from orthrus.engine.choices import Guessed, Judged, choose, rank
from orthrus.engine.detokenize import AnswerText
from orthrus.engine.layer_code import sources_digest
from orthrus.engine.request import Request
from orthrus.errors import StorageError
from orthrus.model.dual_view import DualView
from orthrus.model.passes import causal, join, tree
from orthrus.model.pool import Slots, pages_for
from orthrus.model.runner import Runner

ROWS = (1, 2, 4, 5, 6, 8, 9, 12, 16, 17, 24, 25, 32, 33, 48, 64, 128, 256)
"""Numbers of AR rows that are timed; others are interpolated. Kernels take rows in groups, so the first row beyond a
group costs most. That is why 5, 9, 17, 25 and 33 are among them."""
BLOCKS, BESIDE = (1, 2, 3, 4), 8
"""BLOCKS: numbers of blocks that are timed. BESIDE: the number of AR rows in the same pass."""
DRAFT_ROWS = (2, 4, 6, 8, 12, 16, 24, 32)
"""Rows of the block in timed draft passes: those below the view's block size, and the block size itself."""
HISTORY = 256
"""Committed tokens that timed passes read, about as many as in the middle of an answer."""
GUESSES = (1, 2, 4, 8, 16)
"""Guesses of timed proposals: those below the guesses of the longest block, and these."""
TABLE_VERSION = 17
"""Version of the stored tables. Raise it when passes do more, or less, beside their layers."""
TREE = 24
"""Nodes of the tree whose construction is timed as a part of making a proposal."""
TIMED_BLOCKS = 3
"""Limit on the blocks of a pass, for the policy whose decisions are timed as a part of making a proposal."""
PLAIN_RUN = 5
"""Passes of one row that run before a round's other passes, and before its proposals, because a processor is slower
for a while after large passes."""
WARM_ROWS = 32
"""Most AR rows of the passes in the warm-up round."""
REPEATS, ENOUGH = 5, 10
"""REPEATS: rounds that the first start times. ENOUGH: rounds in total; until then each later start adds one."""
BUSY = 1.5
"""A round this many times as slow as the fastest one was timed on a busy machine. Smaller factors are drift."""

OnMeasure = Callable[[int, int], None]
"""Called with (rounds done, rounds in all) while passes are timed."""

Round = dict[str, float]
"""Milliseconds by name: `body 8+16` for the layers with 8 AR rows and 16 block rows, `head 8` for projecting 8 rows,
`greedy choice 8` and `greedy draft 8` for the choices of 8 rows and a proposal with 8 guesses of a greedy request
(likewise `sampled`)."""


class Costs(NamedTuple):
    """The cost tables of greedy and of sampled decoding, because drawing a token costs more than taking the best."""

    greedy: CostTable
    sampled: CostTable


def pass_costs(runner: Runner, on_measure: OnMeasure | None = None, *, add_round: bool = True) -> Costs:
    """The cost tables of this runner on this machine, from the cache folder or measured now (a few seconds).

    add_round: also time another round, until there are `ENOUGH`. A start that must be fast passes False. Rounds of a
    busy machine are dropped if there are quiet ones.
    """
    key = _key(runner)
    file = _file(key)
    rounds, num_timed = _read(file)
    if not rounds or (add_round and num_timed < ENOUGH):
        repeats = 1 if rounds else REPEATS
        timed = time_rounds(runner, on_measure, repeats=repeats)
        before, alike = rounds, [each for each in rounds if each.keys() == timed[0].keys()]
        rounds = quiet_rounds(alike + timed)
        # If older rounds were dropped, later starts have to replace them.
        num_timed = num_timed + repeats if all(each in rounds for each in before) else len(rounds)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            kept = {"key": key, "num_timed": num_timed, "rounds": rounds}
            write_text_atomic(file, json.dumps(kept, indent=1) + "\n")
        except (StorageError, OSError):
            # Without a writable cache folder, the next start measures again.
            pass
    return costs_of(rounds)


def costs_of(rounds: Sequence[Round]) -> Costs:
    """The tables of timed rounds."""
    return Costs(cost_table(rounds), cost_table(rounds, greedy=False))


def cost_table(rounds: Sequence[Round], *, greedy: bool = True) -> CostTable:
    """The table of timed rounds, all of the same passes: medians after the rounds were scaled to one speed.

    A drifting machine slows all passes of a round by the same factor, and the scaling cancels it. Minima would be
    wrong: a plain pass, which waits for memory, gains more from a quiet moment than a pass of many rows.
    """
    pairs = list(zip(rounds, _slowness(rounds), strict=True))
    ms = {name: median(each[name] / slowness for each, slowness in pairs) for name in rounds[0]}
    bodies = [tuple(map(int, name[5:].split("+"))) for name in ms if name.startswith("body ")]
    rows = sorted(n for n, block in bodies if not block)
    draft_rows = sorted(block for n, block in bodies if n == 1 and block)
    block_rows = sorted(block for n, block in bodies if n == BESIDE and block)
    alone_ms = ms[f"body {BESIDE}+0"]
    kind = "greedy" if greedy else "sampled"
    guesses = sorted(int(name.rpartition(" ")[2]) for name in ms if name.startswith(f"{kind} draft "))
    return CostTable(
        rows=tuple(rows),
        body_ms=_ascending([ms[f"body {n}+0"] for n in rows]),
        head_ms=_ascending([ms[f"head {n}"] + ms[f"{kind} choice {n}"] for n in rows]),
        block_rows=tuple(block_rows),
        block_ms=_ascending([max(0.0, ms[f"body {BESIDE}+{n}"] - alone_ms) for n in block_rows]),
        draft_rows=tuple(draft_rows),
        draft_pass_ms=_ascending([ms[f"body 1+{n}"] for n in draft_rows]),
        guesses=tuple(guesses),
        proposal_ms=_ascending([ms[f"{kind} draft {n}"] for n in guesses]),
    )


def quiet_rounds(rounds: Sequence[Round]) -> list[Round]:
    """The rounds in which the machine was about as quiet as in the fastest one.

    Other processes slow some passes more than others. So one factor cannot correct such a round, and it is dropped.
    """
    slowness = _slowness(rounds)
    least = min(slowness)
    return [each for each, slow in zip(rounds, slowness, strict=True) if slow < BUSY * least]


def _slowness(rounds: Sequence[Round]) -> list[float]:
    """For each round, the typical ratio of a pass's time to its median over all rounds."""
    usual = {name: median(each[name] for each in rounds) for name in rounds[0]}
    return [median(each[name] / ms for name, ms in usual.items() if ms > 0.0) for each in rounds]


@torch.inference_mode()
def time_rounds(
    runner: Runner, on_measure: OnMeasure | None = None, *, repeats: int = REPEATS
) -> list[Round]:
    """Time passes of several numbers of rows after `HISTORY` tokens, in `repeats` rounds after a warm-up round.

    Block rows are timed in passes with `BESIDE` AR rows, and in draft passes with one AR row. Sampled means temperature
    1 without filters.
    """
    dual = runner.dual
    size = dual.config.block_size
    pool = runner.new_pool(pages_for(HISTORY + max(ROWS) + max(BLOCKS) * size))
    slots = Slots(pool)
    requests = {"greedy": _timed_request(dual, slots, 0.0), "sampled": _timed_request(dual, slots, 1.0)}
    slots.reserve(HISTORY + max(ROWS) + max(BLOCKS) * size)
    ids = [i % dual.vocab_size for i in range(max(HISTORY, *ROWS))]
    for start in range(0, HISTORY, 64):
        runner.hidden(join([(causal(ids[start : start + 64]), slots)], dual.device), pool)
        slots.commit(64)
    mask_token_id = dual.mask_token_id
    parts = {(n, 0): causal(ids[:n]) for n in ROWS}
    chain = range(BESIDE - 1)
    for m in BLOCKS:
        parts[BESIDE, m * size] = tree(ids[:BESIDE], chain, range(m), size, mask_token_id)
    # At least two numbers are needed for the cost of a row.
    draft_rows = sorted({min(2, size - 1), *(n for n in DRAFT_ROWS if n < size), size})
    for n in draft_rows:
        parts[1, n] = tree(ids[:1], [], [0], n, mask_token_id)
    most_guesses = dual.config.num_guesses(size)
    guesses = sorted({1, 2, *(n for n in GUESSES if n < most_guesses), max(2, most_guesses)})
    policies = {n: _timed_policy(n) for n in guesses}
    plain = (1, 0), parts[1, 0]
    # From the smallest to the largest, so that none runs after a much larger one.
    passes = [plain] * PLAIN_RUN + sorted(parts.items(), key=lambda each: sum(each[0]))
    num_rounds = repeats + 1
    rounds = []
    for done in range(num_rounds):
        if on_measure is not None:
            on_measure(done, num_rounds)
        clock = _Clock(dual.device)
        for (n, block), part in passes:
            if done == 0 and n > WARM_ROWS:
                continue
            with clock(f"body {n}+{block}"):
                hidden_RC = runner.hidden(join([(part, slots)], dual.device), pool)
            if block:
                continue
            # Free the megabytes of the last logits before the clock starts.
            logits_RV = hidden_RC
            with clock(f"head {n}"):
                logits_RV = runner.head(hidden_RC)
            # Rows of a tree share positions, and their noise is computed once.
            positions = [HISTORY + 1 + i % size for i in range(n)]
            for kind, request in requests.items():
                with clock(f"{kind} choice {n}"):
                    choose(logits_RV, [Judged(request, slice(0, n), positions, [[] for _ in range(n)])])
        for _ in range(PLAIN_RUN):
            runner.hidden(join([(plain[1], slots)], dual.device), pool)
        for kind, request in requests.items():
            for n in guesses:
                with clock(f"{kind} draft {n}"):
                    _draft(runner, request, policies[n], hidden_RC[:n], logits_RV[:n], ids[0])
                slots.length = HISTORY
        rounds.append(clock.round())
    return rounds[1:]


def _draft(
    runner: Runner, request: Request, policy: Policy, hidden_DC: Tensor, logits_DV: Tensor, anchor_id: int
) -> None:
    """Make a proposal with all that belongs to it: candidates, a tree, the part that verifies it, a path to gather.

    The policy's decisions belong to it too. In a pass of some milliseconds they count.
    """
    if runner.dual.draft_head is not None:
        logits_DV = runner.head(hidden_DC, drafts=True)
    (drafts,) = rank(runner, hidden_DC, logits_DV, [Guessed(request, slice(0, len(logits_DV)), HISTORY + 1)])
    policy.wants_draft()
    nodes = best_first_tree(drafts, TREE)
    policy.num_nodes(nodes.log_probs, nodes.depths(), len(drafts), stale=False)
    policy.num_blocks(nodes.num_nodes, nodes.end_probs())
    tree([anchor_id, *nodes.token_ids], nodes.parents)
    request.slots.compact(sorted({0, nodes.num_nodes}))
    policy.observe(nodes.log_probs, 1, [], stale=False, left="none")


def _timed_policy(num_guesses: int) -> Policy:
    """A policy whose decisions are timed. What it decides has no effect."""
    same_ms = (1.0, 1.0)
    table = CostTable((1, 2), same_ms, same_ms, (1, 2), same_ms, (1, 2), same_ms, (1, 2), same_ms)
    return Policy(Prices(table), num_guesses, TREE, TIMED_BLOCKS)


def _timed_request(dual: DualView, slots: Slots, temperature: float) -> Request:
    """A request without text, whose choices and proposals are timed."""
    config = DecodeConfig(sampling=SamplingParams(temperature=temperature, seed=0))
    return Request(
        prompt_ids=[0],
        config=config,
        stop=StopRules(frozenset(), 1),
        rules=LogitRules(config.sampling, dual.vocab_size, dual.device),
        text=AnswerText(None, ()),
        slots=slots,
        seed=0,
        block_size=dual.config.block_size,
        context_length=HISTORY,
    )


class _Clock:
    """Measures the times of each part of a round, in ms."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronize(self._device)
        start = perf_counter()
        yield
        synchronize(self._device)
        self._times[name].append((perf_counter() - start) * 1e3)

    def round(self) -> Round:
        """The medians by name. Only plain passes are timed several times, because the first ones follow other work."""
        return {name: median(times) for name, times in self._times.items()}


def _ascending(values: list[float]) -> tuple[float, ...]:
    """Correct measured times so that more rows never cost less."""
    return tuple(accumulate(reversed(values), min))[::-1]


def _key(runner: Runner) -> dict[str, object]:
    """All that the costs may depend on."""
    dual = runner.dual
    config = dual.base.config
    on_gpu = dual.device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(dual.device) if on_gpu else cpu_model() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": [installed_version(name) for name in ("orthrus-lm", "torch", "transformers")],
        "base": dual.config.base_fingerprint or config.to_json_string(),
        "view": [dual.config.layers, dual.config.twins, dual.config.rank, dual.config.block_size],
        "repair": dual.config.repair_rank,
        "table": TABLE_VERSION,
        "dtype": str(dual.dtype),
        "drafts": [dual.draft_precision, None if dual.draft_ids_N is None else len(dual.draft_ids_N)],
        "runner": [runner.name, dual.precision, sources_digest()],
    }


def _file(key: dict[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "costs" / f"{digest[:24]}.json"


def _read(file: Path) -> tuple[list[Round], int]:
    """(stored rounds, how many were timed in all). Empty if the file has no usable rounds."""
    try:
        kept = parse_json(file.read_text(encoding="utf-8"))
        num_timed = int(kept["num_timed"])
        rounds = [{str(name): float(ms) for name, ms in each.items()} for each in kept["rounds"]]
        if not all(0.0 <= ms < math.inf for each in rounds for ms in each.values()):
            return [], 0
        # Raises if an entry is missing.
        costs_of(rounds)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        return [], 0
    return rounds, num_timed
