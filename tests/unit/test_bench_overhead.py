"""The overhead measurement runs whole on a tiny model; only the counted figure has a value to assert."""

import json

from tests.tiny_orthrus import tiny_orthrus

from orthrus.bench.overhead import OverheadOptions, measure_overhead


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
        "cycle_over_passes, K = 4",
        "extra_kv_bytes, K = 4",
        "cycle_over_passes, K = 16",
        "extra_kv_bytes, K = 16",
        "ttft_chain_over_ar",
    }
    # 2 x 2 layers x 2 key/value heads x 8 numbers x 16 slots x 4 bytes.
    memory = checks["extra_kv_bytes, K = 16"]
    assert memory.value == memory.target == 2 * 2 * 2 * 8 * 16 * 4
    assert memory.passed
    assert checks["cycle_over_passes, K = 4"].value > 0.5
    assert [rows for rows, *_ in report.pass_costs] == [1, 4]
    assert report.pass_costs[0][2] == 1.0
    assert len(seen) == 6
    assert orthrus.dual.config.block_size == 8
    raw = json.loads(json.dumps(report.to_dict()))
    assert {"legend", "provenance", "model", "options", "checks"} <= raw.keys()
    assert "| extra_kv_bytes, K = 16 | 4096 | = 4096 | PASS |" in report.to_markdown()
