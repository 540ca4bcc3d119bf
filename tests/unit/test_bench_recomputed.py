"""Every number of a report, computed once more from the raw records alone, as docs/metrics.md writes it down."""

import json
import math
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pytest
from tests.tiny_orthrus import tiny_orthrus

from orthrus.base.bench_prompts import BenchPrompt
from orthrus.bench import BenchOptions, run_bench
from orthrus.bench.legend import LEGEND
from orthrus.bench.machine import Energy, peak_bytes
from orthrus.bench.report import BenchReport
from orthrus.bench.vllm_form import acceptance
from orthrus.errors import UserInputError

ROOT = Path(__file__).parents[2]
PROMPTS = [
    BenchPrompt("first", "math"),
    BenchPrompt("second one", "math"),
    BenchPrompt("third", "chat"),
    BenchPrompt("fourth", "chat"),
]
OPTIONS = BenchOptions(
    prompts=PROMPTS,
    strategies=("chain", "chain:floor=false", "chain:block-size=4", "tree"),
    temperatures=(0.0, 1.0),
    max_new_tokens=20,
    repeats=2,
)


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    """A report as it stands in a file."""
    return json.loads(json.dumps(run_bench(tiny_orthrus(), OPTIONS).to_dict()))


def values(row: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """A row's numbers, from runs alone."""
    every = [
        r
        for r in raw["runs"]
        if r["temperature"] == row["temperature"] and row["domain"] in ("all", r["domain"])
    ]
    mine = [r for r in every if r["arm"] == row["arm"]]
    tokens = [1 + sum(r["committed"]) for r in mine]
    passes = [r["num_passes"] for r in mine]
    cycles = [len(r["committed"]) for r in mine]
    accepted = [n for r in mine for n in r["accepted"]]
    judged = [n for r in mine for n in r["judged"]]
    repeats = [[r for r in mine if r["repeat"] == n] for n in (0, 1)]
    after_first = sum(tokens) - len(mine)
    found: dict[str, Any] = {
        "tokens": sum(tokens),
        "passes": sum(passes),
        "cycles": sum(cycles),
        "tokens_per_cycle_mean": fmean((t - 1) / c for t, c in zip(tokens, cycles, strict=True) if c),
        "tokens_per_cycle_pooled": after_first / sum(cycles),
        "tokens_per_cycle_histogram": counted([n for r in mine for n in r["committed"]]),
        "tokens_per_forward_mean": fmean(t / p for t, p in zip(tokens, passes, strict=True)),
        "tokens_per_forward_pooled": sum(tokens) / sum(passes),
        "rows_per_pass": sum(r["num_rows"] for r in mine)
        / sum(r["num_passes"] - r["num_prefill_passes"] for r in mine),
        "acceptance_rate": sum(accepted) / max(1, sum(n for r in mine for n in r["drafted"])),
        "accepted_per_cycle": sum(accepted) / max(1, len(accepted)),
        "accepted_histogram": counted(accepted),
        "acceptance_by_position": positions(judged, accepted),
        "ttft_ms": spread([r["ttft_ms"] for r in mine]),
        "tpot_ms": spread(
            [sum(r["decode_ms"] for r in p) / sum(sum(r["committed"]) for r in p) for p in repeats]
        ),
        "tokens_per_second": spread([1e3 * sum(map(num, p)) / sum(map(total, p)) for p in repeats]),
        "equal_to_plain": equal(mine),
        "peak_bytes": max(r["peak_bytes"] for r in mine),
        "joules_per_token": None,
    }
    for name, slow in (("speedup_vs_stock", "stock"), ("speedup_vs_ar", "ar")):
        found[name] = interval([[*ratios(every, slow, row["arm"])]])
    sizes, work = raw["model"]["sizes"], [r["work"] for r in mine]
    found["flops_per_token"] = sum(flops(w, sizes) for w in work) / after_first
    found["bytes_per_token"] = sum(moved(w, sizes) for w in work) / after_first
    return found


def num(run: dict[str, Any]) -> int:
    return 1 + sum(run["committed"])


def total(run: dict[str, Any]) -> float:
    return run["ttft_ms"] + run["decode_ms"]


def counted(numbers: list[int]) -> list[int]:
    return [numbers.count(n) for n in range(max(numbers) + 1)] if numbers else []


def positions(judged: list[int], accepted: list[int]) -> list[float]:
    rates = []
    for j in range(1, max(judged, default=0) + 1):
        reached = [a for n, a in zip(judged, accepted, strict=True) if n >= j and a >= j - 1]
        if not reached:
            break
        rates.append(len([a for a in reached if a >= j]) / len(reached))
    return rates


def spread(numbers: list[float]) -> dict[str, float]:
    return {"median": median(numbers), "low": min(numbers), "high": max(numbers)}


def equal(runs: list[dict[str, Any]]) -> list[int] | None:
    if any(r["equal_to_plain"] is None for r in runs):
        return None
    key = lambda r: r["prompt_index"]  # noqa: E731
    by_prompt = [list(group) for _, group in groupby(sorted(runs, key=key), key)]
    return [sum(all(r["equal_to_plain"] for r in group) for group in by_prompt), len(by_prompt)]


def ratios(runs: list[dict[str, Any]], slow: str, arm: str) -> list[float]:
    found = []
    for prompt in dict.fromkeys(r["prompt_index"] for r in runs):
        by = {(r["arm"], r["repeat"]): total(r) / num(r) for r in runs if r["prompt_index"] == prompt}
        found.append(median(by[slow, n] / by[arm, n] for n in (0, 1)))
    return found


def interval(groups: list[list[float]]) -> dict[str, float | None]:
    """The draws of a generator of seed 0, group by group; none where a group has a single number."""
    rng, logs = np.random.default_rng(0), [[math.log(x) for x in group] for group in groups]
    if min(map(len, logs)) < 2:
        return {"value": math.exp(fmean(map(fmean, logs))), "low": None, "high": None}
    draws = np.mean([rng.choice(g, (10_000, len(g))).mean(axis=1) for g in logs], axis=0)
    low, high = np.exp(np.percentile(draws, [2.5, 97.5]))
    return {"value": math.exp(fmean(map(fmean, logs))), "low": low, "high": high}


def flops(work: dict[str, int], sizes: dict[str, Any]) -> int:
    """2 for each weight that a row meets, 4 x heads x head size x layers for each position that it reads."""
    rows = work["ar_rows"] + work["diffusion_rows"]
    weights = rows * sizes["shared"] + work["ar_rows"] * sizes["ar"]
    weights += work["diffusion_rows"] * sizes["diffusion"]
    weights += work["head_rows"] * sizes["head"] + work["draft_head_rows"] * sizes["draft_head"]
    return 2 * weights + sizes["attention"] * work["pairs"]


def moved(work: dict[str, int], sizes: dict[str, Any]) -> int:
    weights = work["passes"] * sizes["shared_bytes"] + work["ar_passes"] * sizes["ar_bytes"]
    weights += work["diffusion_passes"] * sizes["diffusion_bytes"] + work["head_calls"] * sizes["head_bytes"]
    weights += work["draft_head_calls"] * sizes["draft_head_bytes"]
    return weights + (work["history"] + work["ar_rows"] + work["diffusion_rows"]) * sizes["slot_bytes"]


def test_rows_come_from_raw_records_alone(raw: dict[str, Any]) -> None:
    assert len(raw["rows"]) == 2 * 3 * len(OPTIONS.arms)
    names = {"arm", "domain", "temperature", "prompts"}
    for row in raw["rows"]:
        found = values(row, raw)
        assert found.keys() == row.keys() - names
        for name, value in found.items():
            assert row[name] == (value if value is None else pytest.approx(value)), (row["arm"], name)


def test_summaries_come_from_raw_records_alone(raw: dict[str, Any]) -> None:
    for line in raw["summaries"]:
        runs = [r for r in raw["runs"] if r["temperature"] == line["temperature"]]
        domains = [[r for r in runs if r["domain"] == d] for d in ("math", "chat")]
        for name, slow in (("speedup_vs_stock_geomean", "stock"), ("speedup_vs_ar_geomean", "ar")):
            assert line[name] == pytest.approx(interval([ratios(d, slow, line["arm"]) for d in domains]))
        means = [interval([ratios(d, "stock", line["arm"])])["value"] for d in domains]
        assert line["worst_domain"] == [("math", "chat")[means[1] < means[0]], pytest.approx(min(means))]


def test_counters_agree_with_records(raw: dict[str, Any]) -> None:
    for run in raw["runs"]:
        work = run["work"]
        assert num(run) == run["num_tokens"]
        assert work["ar_rows"] + work["diffusion_rows"] == run["num_rows"]
        assert work["passes"] == run["num_passes"] - run["num_prefill_passes"]
        assert (sum(run["drafted"]), sum(run["accepted"])) == (run["num_drafted"], run["num_accepted"])
        assert all(
            a <= j <= d for a, j, d in zip(*(run[n] for n in ("accepted", "judged", "drafted")), strict=True)
        )
        if run["arm"] == "ar":
            # One row a pass, which reads its history and itself.
            num_new, length = run["num_tokens"] - 1, run["num_prompt_tokens"]
            assert work["pairs"] == sum(length + i + 1 for i in range(num_new))
            assert work["head_rows"] == num_new


def test_drafting_adds_arithmetic(raw: dict[str, Any]) -> None:
    rows = {r["arm"]: r for r in raw["rows"] if r["domain"] == "all" and r["temperature"] == 0.0}
    assert rows["ar"]["flops_per_token"] == rows["stock"]["flops_per_token"]
    assert rows["chain"]["flops_per_token"] > rows["ar"]["flops_per_token"]
    assert rows["chain:floor=false"]["tokens_per_cycle_mean"] < rows["chain"]["tokens_per_cycle_mean"]


def test_sizes_count_every_weight_once() -> None:
    from orthrus.bench.work import sizes_of

    orthrus = tiny_orthrus()
    sizes = sizes_of(orthrus.dual, orthrus.dual.dtype)
    assert sizes is not None
    layers = [m for n, m in orthrus.stock().named_modules() if n.endswith("_proj")]
    assert sizes.shared + sizes.ar == sum(m.weight.numel() for m in layers)  # type: ignore[union-attr, operator, misc]
    assert sizes.diffusion == sizes.ar
    assert sizes.ar_bytes == 4 * sizes.ar


def test_every_formula_is_documented() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in LEGEND if f"`{name}`" not in page] == []


def test_vllms_schema_adds_up(raw: dict[str, Any]) -> None:
    found = acceptance(BenchReport.from_dict(raw))
    assert len(found) == sum(bool(r["accepted"]) for r in raw["runs"])
    for entry in found:
        stats = entry["metrics"]["speculative_decoding"]
        assert stats["num_spec_steps"] == sum(stats["acceptance_histogram"].values())
        assert stats["num_accepted_draft_tokens"] == sum(stats["per_step_accepted"])
        assert stats["mean_acceptance_length"] == pytest.approx(1 + fmean(stats["per_step_accepted"]))


class StoppedError(Exception):
    """A run that is killed."""


def test_a_stopped_run_goes_on() -> None:
    parts: list[BenchReport] = []

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("chat"):
            raise StoppedError

    orthrus = tiny_orthrus()
    with pytest.raises(StoppedError):
        run_bench(orthrus, OPTIONS, stop, on_part=parts.append)
    begun = BenchReport.from_dict(json.loads(json.dumps(parts[-1].to_dict())))
    assert not begun.is_complete
    assert {r.prompt_index for r in begun.runs} == {0, 1}
    stages: list[str] = []
    report = run_bench(orthrus, OPTIONS, lambda stage, *_: stages.append(stage), begun=begun)
    whole = run_bench(orthrus, OPTIONS)
    assert not [s for s in stages if s.startswith("math")]
    assert [(r.arm, r.prompt_index, r.repeat, r.output) for r in report.runs] == [
        (r.arm, r.prompt_index, r.repeat, r.output) for r in whole.runs
    ]
    assert report.is_complete
    assert len(report.provenance["resumed"]) == 1
    assert all(r.equal_to_plain is not False for r in report.runs)
    other = BenchOptions(prompts=PROMPTS, max_new_tokens=7)
    with pytest.raises(UserInputError, match=r"another options \(.*max_new_tokens"):
        run_bench(orthrus, other, begun=begun)


def test_energy_is_counted_or_not_available(tmp_path: Path) -> None:
    assert Energy(tmp_path).describe()["counters"] == "not available"
    assert Energy(tmp_path).stop() is None
    for name, kind in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "name").write_text(kind + "\n")
        (folder / "energy_uj").write_text("990000")
        (folder / "max_energy_range_uj").write_text("999999")
    energy = Energy(tmp_path, idle_s=0.0)
    assert [c.name for c in energy.counters] == ["intel-rapl:0 (package-0)", "intel-rapl:0:1 (dram)"]
    assert energy.idle_watts == 0.0
    energy.start()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("40000")
    # Past its largest value the counter began anew.
    assert energy.stop() == pytest.approx(0.05)


def test_peak_memory_is_that_of_the_process() -> None:
    import torch

    peak = peak_bytes(torch.device("cpu"))
    assert peak is None or peak > 1e7
