"""The overhead measurement runs whole on a tiny model; what it times has no value to assert."""

import json
from collections.abc import Callable

import pytest
import torch
from tests.tiny_orthrus import tiny_orthrus
from torch import Tensor

from orthrus.bench import overhead
from orthrus.bench.overhead import DRAFTING, OverheadOptions, measure_overhead
from orthrus.bench.statistics import Spread
from orthrus.model.passes import Pass
from orthrus.model.pool import SlotPool
from orthrus.model.runner import EagerRunner


def test_every_measurement_is_there() -> None:
    orthrus = tiny_orthrus()
    seen: list[str] = []
    report = measure_overhead(
        orthrus,
        OverheadOptions(block_sizes=(4, 16), row_counts=(1, 4), history=12, repeats=2, warmup=0),
        seen.append,
    )

    checks = {check.name: check for check in report.checks}
    assert set(checks) == {
        *(f"cycle_over_passes, {strategy}, K = {k}" for strategy in DRAFTING for k in (4, 16)),
        *(f"ttft_over_ar, {strategy}" for strategy in DRAFTING),
    }  # fmt: skip
    assert all(check.value > 0 for check in checks.values())
    assert [rows for rows, *_ in report.pass_costs] == [1, 4]
    assert report.pass_costs[0][2] == 1.0
    assert len(seen) == 3 * len(DRAFTING) + 1
    assert orthrus.dual.config.block_size == 8
    raw = json.loads(json.dumps(report.to_dict()))
    assert {"legend", "provenance", "model", "options", "checks"} <= raw.keys()
    assert "| ttft_over_ar, tree | " in report.to_markdown()


def test_a_cycle_is_measured_against_its_very_own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    orthrus = tiny_orthrus()
    hidden, head, work = EagerRunner.hidden, EagerRunner.head, [0.0]

    def counted_hidden(self: EagerRunner, p: Pass, pool: SlotPool) -> Tensor:
        work[0] += sum(span.part.num_rows * (span.length + span.part.num_rows) for span in p.spans)
        return hidden(self, p, pool)

    def counted_head(self: EagerRunner, hidden_RC: Tensor, *, drafts: bool = False) -> Tensor:
        work[0] += len(hidden_RC)
        return head(self, hidden_RC, drafts=drafts)

    def spent(device: torch.device, call: Callable[[], object]) -> float:
        before = work[0]
        with torch.inference_mode():
            call()
        return work[0] - before

    monkeypatch.setattr(EagerRunner, "hidden", counted_hidden)
    monkeypatch.setattr(EagerRunner, "head", counted_head)
    monkeypatch.setattr(overhead, "_time", spent)
    report = measure_overhead(
        orthrus, OverheadOptions(block_sizes=(4, 8), row_counts=(1,), history=9, repeats=2, warmup=1)
    )
    spreads = [check.spread for check in report.checks if check.name.startswith("cycle")]
    assert spreads == [Spread(1.0, 1.0, 1.0)] * 2 * len(DRAFTING)
