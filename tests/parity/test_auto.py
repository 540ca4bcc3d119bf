"""`auto` on machines of every kind: it drafts, branches, fuses or does not, and the text never changes."""

import json
from collections import Counter
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import pytest
import torch
from tests.engines import engine_for
from tests.tiny import tiny_dual, tiny_prompt
from tests.tiny_orthrus import tiny_orthrus
from tests.unit.test_policy import FLAT, MIDDLE, STEEP

from orthrus.config import DecodeConfig, SamplingParams
from orthrus.decoding.cost_table import CostTable
from orthrus.decoding.policy import Policy
from orthrus.decoding.prices import Prices
from orthrus.engine import costs
from orthrus.types import GenerationResult

PROMPT = [5, 9, 23, 4, 17, 8]
SAMPLING = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=0.9, seed=11),
    "filtered": SamplingParams(temperature=1.1, top_k=20, top_p=0.9, min_p=0.02, seed=5),
    "penalised": SamplingParams(temperature=0.8, repetition_penalty=1.3, seed=2),
}


def decode(
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    sampling: SamplingParams,
    table: CostTable,
    disturb: float,
    head: float = 0.0,
) -> GenerationResult:
    """head: how much a random repair head says, 0 for none."""
    orthrus = tiny_orthrus(disturb=disturb)
    if head:
        orthrus.dual.add_repair(6)
        assert orthrus.dual.repair is not None
        with torch.no_grad():
            orthrus.dual.repair.out.weight.normal_(0.0, head, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("orthrus.engine.engine.pass_costs", lambda *_, **__: costs.Costs(table, table))
    config = DecodeConfig(max_new_tokens=60, strategy=strategy, ignore_eos=True, sampling=sampling)  # type: ignore[arg-type]
    return orthrus.stream_ids(PROMPT, config).drain()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("table", [FLAT, MIDDLE, STEEP], ids=["flat", "middle", "steep"])
@pytest.mark.parametrize("disturb", [0.0, 0.4], ids=["good", "poor"])
def test_the_text_is_that_of_plain_decoding(
    monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams, table: CostTable, disturb: float
) -> None:
    plain = decode(monkeypatch, "ar", sampling, table, disturb)
    auto = decode(monkeypatch, "auto", sampling, table, disturb)
    assert auto.token_ids == plain.token_ids
    kinds = {cycle.kind for cycle in auto.cycles}
    if table is STEEP:
        assert auto.stats.num_passes <= 1.05 * plain.stats.num_passes
        assert auto.stats.rows_per_pass < 2
    if table is FLAT and disturb == 0.0 and sampling.repetition_penalty == 1.0:
        assert "fused_tree" in kinds
        # An untrained view guesses some tokens of a random model, which is enough to gain.
        assert auto.stats.tokens_per_forward > 1.3
        assert auto.stats.num_accepted > 10


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_a_repair_head_changes_drafts_and_no_text(
    monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams
) -> None:
    plain, without = (decode(monkeypatch, which, sampling, FLAT, 0.1) for which in ("ar", "auto"))
    headed = decode(monkeypatch, "auto", sampling, FLAT, 0.1, head=0.3)
    assert headed.token_ids == plain.token_ids
    assert headed.stats.num_accepted > 0
    drafts = [[(c.num_drafted, c.num_accepted) for c in found.cycles] for found in (headed, without)]
    assert drafts[0] != drafts[1]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[costs.Round]]:
    """The rounds of each start that times passes, in order; of a machine that is always as quiet."""
    starts: list[list[costs.Round]] = []
    real = costs.time_rounds

    def time_rounds(*args: Any, **options: Any) -> list[costs.Round]:
        found = real(*args, **options)
        usual = starts[0][0] if starts else found[0]
        starts.append([usual for _ in found])
        return starts[-1]

    monkeypatch.setattr(costs, "time_rounds", time_rounds)
    return starts


def test_costs_are_timed_by_the_first_starts_and_kept_on_disk(timed: list[list[costs.Round]]) -> None:
    runner = tiny_orthrus().engine.runner
    first = costs.pass_costs(runner)
    assert [len(rounds) for rounds in timed] == [costs.REPEATS]
    assert first == costs.costs_of(timed[0])
    for table in first:
        assert table.rows == costs.ROWS
        assert list(table.body_ms) == sorted(table.body_ms)
        assert all(ms > 0 for ms in table.body_ms + table.head_ms)
    later = [costs.pass_costs(tiny_orthrus().engine.runner) for _ in range(8)]
    assert [len(rounds) for rounds in timed[1:]] == [1] * (costs.ENOUGH - costs.REPEATS)
    assert later[-1] == later[-2] == costs.costs_of(list(chain.from_iterable(timed)))


def test_what_a_busy_machine_left_goes_with_the_next_start(timed: list[list[costs.Round]]) -> None:
    quiet = costs.pass_costs(tiny_orthrus().engine.runner)
    (file,) = (costs.cache_dir() / "costs").iterdir()
    stored = json.loads(file.read_text())
    stored["rounds"] = [{name: 2.0 * ms for name, ms in each.items()} for each in stored["rounds"]]
    file.write_text(json.dumps(stored))
    assert costs.pass_costs(tiny_orthrus().engine.runner, add_round=False) != quiet
    assert costs.pass_costs(tiny_orthrus().engine.runner) == quiet
    assert json.loads(file.read_text())["rounds"] == timed[1]


def test_starts_on_a_slower_machine_do_not_time_passes_for_ever(
    monkeypatch: pytest.MonkeyPatch, timed: list[list[costs.Round]]
) -> None:
    costs.pass_costs(tiny_orthrus().engine.runner)
    steady = costs.time_rounds
    monkeypatch.setattr(
        costs,
        "time_rounds",
        lambda *args, **options: [
            {name: 1.7 * ms for name, ms in each.items()} for each in steady(*args, **options)
        ],
    )
    for _ in range(8):
        costs.pass_costs(tiny_orthrus().engine.runner)
    assert len(timed) == 1 + costs.ENOUGH - costs.REPEATS
    (file,) = (costs.cache_dir() / "costs").iterdir()
    assert len(json.loads(file.read_text())["rounds"]) == costs.REPEATS


def test_a_start_in_a_hurry_takes_what_was_timed_before(timed: list[list[costs.Round]]) -> None:
    first = costs.pass_costs(tiny_orthrus().engine.runner, add_round=False)
    assert costs.pass_costs(tiny_orthrus().engine.runner, add_round=False) == first
    assert len(timed) == 1


def test_drawing_tokens_is_timed_in_the_same_rounds(timed: list[list[costs.Round]]) -> None:
    engine = tiny_orthrus().engine
    for greedy in (True, False, False, True):
        engine.prices(greedy=greedy)
    assert len(timed) == 1
    greedy_costs, sampled_costs = engine.costs()
    assert greedy_costs.body_ms == sampled_costs.body_ms
    assert sum(sampled_costs.head_ms) > sum(greedy_costs.head_ms)


@pytest.mark.parametrize("change", [{"head 1": float("nan")}, {"body 1+0": -1.0}, {"head 7": 1.0}])
def test_rounds_that_no_clock_timed_are_left_out(
    change: dict[str, float], timed: list[list[costs.Round]]
) -> None:
    costs.pass_costs(tiny_orthrus().engine.runner)
    (file,) = (costs.cache_dir() / "costs").iterdir()
    stored = json.loads(file.read_text())
    stored["rounds"] = [each | change for each in stored["rounds"]]
    file.write_text(json.dumps(stored))
    assert costs.pass_costs(tiny_orthrus().engine.runner) == costs.costs_of(timed[1])


@pytest.mark.parametrize("content", ["{", '{"rounds": []}', '{"rounds": [{"head 1": 1.0}]}'])
def test_a_table_that_cannot_be_read_is_measured_anew(content: str, timed: list[list[costs.Round]]) -> None:
    costs.pass_costs(tiny_orthrus().engine.runner)
    (file,) = (costs.cache_dir() / "costs").iterdir()
    file.write_text(content)
    assert costs.pass_costs(tiny_orthrus().engine.runner) == costs.costs_of(timed[1])


class Counting(Policy):
    """Counts how often each request asks for a draft."""

    asked: ClassVar[Counter[int]] = Counter()

    def wants_draft(self) -> bool:
        self.asked[id(self)] += 1
        return super().wants_draft()


class Fixed(Prices):
    """A machine that is always alike."""

    def observe(self, *_: object) -> None:
        pass


def test_a_request_asks_for_a_draft_once_a_pass_at_most() -> None:
    """Also where a copy that stood in for the draft is cut to nothing: plain passes are counted by it."""
    dual = tiny_dual("llama", disturb=3.0)
    dual.config = replace(dual.config, goes_on=0.0)
    rows = (1, 8, 16, 32, 64)
    body_ms, head_ms = (10.0, 17.0, 23.0, 37.0, 60.0), (1.0,) * 5
    added_ms = tuple(ms - body_ms[0] for ms in body_ms)
    blocks = tuple(n - 1 for n in rows)
    prices = Fixed(
        CostTable(rows, body_ms, head_ms, blocks[1:], added_ms[1:], blocks, body_ms, (1, 2), head_ms[:1] * 2)
    )
    engine = engine_for(dual, policy=Counting)
    engine._prices = {True: prices, False: prices}
    config = DecodeConfig(max_new_tokens=120, strategy="auto", ignore_eos=True)
    requests = [
        engine.submit(tiny_prompt(6, seed=i) * 4, config, eos_token_ids=frozenset()) for i in range(8)
    ]
    while not all(request.closed for request in requests):
        Counting.asked.clear()
        engine.step()
        assert max(Counting.asked.values(), default=0) <= 1
    num_copied = sum(cycle.num_copied for request in requests for cycle in request.cycles)
    assert num_copied > 0
