"""The overhead measurement runs whole on a tiny model; only the counted figure has a value to assert."""

import json
from collections.abc import Callable

import pytest
import torch
from tests.tiny_orthrus import tiny_orthrus
from torch import Tensor

from orthrus.bench import overhead
from orthrus.bench.metrics import Spread
from orthrus.bench.overhead import DRAFTING, OverheadOptions, measure_overhead
from orthrus.model.passes import Pass
from orthrus.model.slot_cache import SlotCache


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
        *(f"{name}, {strategy}, K = {k}" for name in ("cycle_over_passes", "extra_kv_bytes")
          for strategy in DRAFTING for k in (4, 16)),
        *(f"ttft_over_ar, {strategy}" for strategy in DRAFTING),
    }  # fmt: skip
    # 2 x 2 layers x 2 key/value heads x 8 numbers x 4 bytes, for each slot; 24 nodes, 3 blocks of 16.
    for strategy, slots in {"chain": 16, "tree": 24, "fused": 63, "fused_tree": 72}.items():
        memory = checks[f"extra_kv_bytes, {strategy}, K = 16"]
        assert memory.value == memory.target == 2 * 2 * 2 * 8 * 4 * slots
        assert memory.passed
    assert checks["extra_kv_bytes, tree, K = 4"].passed
    assert all(check.value > 0 for check in checks.values())
    assert [rows for rows, *_ in report.pass_costs] == [1, 4]
    assert report.pass_costs[0][2] == 1.0
    assert len(seen) == 2 * 4 + 4 + 1
    assert orthrus.dual.config.block_size == 8
    raw = json.loads(json.dumps(report.to_dict()))
    assert {"legend", "provenance", "model", "options", "checks"} <= raw.keys()
    assert "| extra_kv_bytes, chain, K = 16 | 4096 | = 4096 | PASS |" in report.to_markdown()


def test_a_cycle_is_measured_against_its_very_own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    orthrus = tiny_orthrus()
    hidden, head, work = orthrus.dual.hidden, orthrus.dual.head, [0.0]

    def counted_hidden(p: Pass, cache: SlotCache) -> Tensor:
        work[0] += p.num_rows * p.num_slots
        return hidden(p, cache)

    def counted_head(hidden_RC: Tensor, *, drafts: bool = False) -> Tensor:
        work[0] += hidden_RC.shape[:-1].numel()
        return head(hidden_RC)

    def spent(device: torch.device, call: Callable[[], object]) -> float:
        before = work[0]
        with torch.inference_mode():
            call()
        return work[0] - before

    monkeypatch.setattr(orthrus.dual, "hidden", counted_hidden)
    monkeypatch.setattr(orthrus.dual, "head", counted_head)
    monkeypatch.setattr(overhead, "_time", spent)
    report = measure_overhead(
        orthrus, OverheadOptions(block_sizes=(4, 8), row_counts=(1,), history=9, repeats=2, warmup=1)
    )
    spreads = [check.spread for check in report.checks if check.name.startswith("cycle")]
    assert spreads == [Spread(1.0, 1.0, 1.0)] * 8
