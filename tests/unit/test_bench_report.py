"""Arithmetic of the report on hand-made runs, its forms, and comparing two."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orthrus.bench.compare import compare_reports
from orthrus.bench.legend import LEGEND
from orthrus.bench.metrics import Row, Summary, rows, summaries
from orthrus.bench.records import About, Run, run_of_result
from orthrus.bench.report import BenchReport, read_report
from orthrus.bench.statistics import Spread
from orthrus.config import STRATEGIES
from orthrus.decoding.stats import summarise
from orthrus.errors import UserInputError
from orthrus.types import Cycle, CycleKind, GenerationResult


def cycle(
    kind: CycleKind, num_tokens: int, drafted: int, accepted: int, passes: int, rows: int, ms: float
) -> Cycle:
    drafts = (False,) + (True,) * accepted + (False,) * (num_tokens - 1 - accepted)
    return Cycle(
        0, kind, "", tuple(range(num_tokens)), drafts[:num_tokens], drafted, accepted, passes, rows, ms
    )


def run(arm: str, prompt: int, repeat: int, tokens: int, ttft: float, decode: float, **more: Any) -> Run:
    domain = ("math", "chat")[prompt]
    plain = {"num_passes": tokens, "num_cycles": tokens - 1, "num_drafted": 0, "num_accepted": 0}
    values = {"accepted_histogram": (), "equal_to_plain": True, "temperature": 0.0} | plain | more
    values = {"num_prefill_passes": 1, "num_rows": values["num_cycles"]} | values
    where = {"arm": arm, "prompt_index": prompt, "domain": domain, "repeat": repeat, "num_prompt_tokens": 10}
    return Run(**where, num_tokens=tokens, ttft_ms=ttft, decode_ms=decode, **values)


HAND_MADE = (
    run("stock", 0, 0, 11, 100.0, 1000.0),
    run("ar", 0, 0, 11, 110.0, 990.0),
    run("chain", 0, 0, 11, 100.0, 450.0, num_passes=9, num_rows=64, num_cycles=4, num_drafted=24,
        num_accepted=6, accepted_histogram=(1, 1, 1, 1)),
    run("stock", 0, 1, 11, 200.0, 2000.0),
    run("ar", 0, 1, 11, 220.0, 1980.0),
    run("chain", 0, 1, 11, 200.0, 350.0, num_passes=9, num_rows=64, num_cycles=4, num_drafted=24,
        num_accepted=6, accepted_histogram=(1, 1, 1, 1)),
)  # fmt: skip


def report(runs: tuple[Run, ...] = HAND_MADE, **changes: Any) -> BenchReport:
    model = {"model": "tiny", "dtype": "float32", "device": "cpu", "view": "trained", "block_size": 8}
    options = {
        "temperatures": [0.0],
        "block_size": None,
        "num_prompts": 1,
        "max_new_tokens": 11,
        "repeats": 2,
    }
    made = {"command": "orthrus bench", "threads": 1}
    return BenchReport(runs, model | changes.pop("model", {}), options, made | changes)


def by_arm(found: list[Row], domain: str = "all") -> dict[str, Row]:
    return {row.arm: row for row in found if row.domain == domain}


def test_cycles_become_a_run() -> None:
    cycles = [
        cycle("prefill", 1, 0, 0, 2, 10, 50.0),
        cycle("chain", 4, 6, 2, 2, 16, 30.0),
        cycle("chain", 2, 6, 0, 2, 16, 30.0),
        cycle("ar", 1, 0, 0, 1, 1, 10.0),
    ]
    result = GenerationResult("", (), "length", summarise(10, cycles), tuple(cycles))
    made = run_of_result("chain", About(0, "math", 0, 0.0), result)

    assert (made.num_tokens, made.num_passes, made.num_cycles) == (8, 7, 3)
    assert (made.num_prefill_passes, made.num_rows) == (2, 33)
    assert (made.num_drafted, made.num_accepted, made.accepted_histogram) == (12, 2, (1, 0, 1))
    assert (made.ttft_ms, made.decode_ms, made.total_ms) == (50.0, 70.0, 120.0)
    row = by_arm(rows([replace(made, arm=arm) for arm in ("stock", "ar", "chain")]))["chain"]
    assert row.tokens_per_cycle_pooled == pytest.approx(7 / 3)
    assert row.tokens_per_forward_mean == pytest.approx(8 / 7)
    assert row.acceptance_rate == pytest.approx(1 / 6)
    assert row.rows_per_pass == pytest.approx(33 / 5)


def test_arithmetic_of_times() -> None:
    found = by_arm(rows(HAND_MADE))
    chain = found["chain"]

    assert (chain.prompts, chain.tokens, chain.passes, chain.cycles) == (1, 22, 18, 8)
    assert chain.tokens_per_cycle_mean == 2.5
    assert chain.acceptance_rate == 0.25
    assert (chain.rows_per_pass, found["ar"].rows_per_pass) == (8.0, 1.0)
    assert chain.accepted_histogram == (2, 2, 2, 2)
    assert chain.ttft_ms == Spread(150.0, 100.0, 200.0)
    assert chain.tpot_ms == Spread(40.0, 35.0, 45.0)
    # Per repeat: 1100 / 550 and 2200 / 550 ms for as many tokens; one prompt, so nothing to draw from.
    assert chain.speedup_vs_stock.value == pytest.approx(3.0)
    assert chain.speedup_vs_stock.low == pytest.approx(chain.speedup_vs_stock.high)
    assert chain.tokens_per_second.median == pytest.approx(20.0)
    assert found["stock"].speedup_vs_stock.value == 1.0
    assert found["stock"].tokens_per_cycle_mean == 1.0
    assert found["ar"].speedup_vs_stock.value == 1.0


def test_mean_and_pooled_differ_and_domains_are_apart() -> None:
    more = tuple(
        run(arm, 1, repeat, 3, 10.0, 10.0, num_passes=2, num_cycles=1)
        for repeat in (0, 1)
        for arm in ("stock", "ar", "chain")
    )
    found = rows(HAND_MADE + more)

    assert [row.domain for row in found] == ["all"] * 3 + ["math"] * 3 + ["chat"] * 3
    whole = by_arm(found)["chain"]
    assert whole.tokens_per_cycle_mean == pytest.approx((2.5 + 2) / 2)
    assert whole.tokens_per_cycle_pooled == pytest.approx((10 + 2) / 5)
    assert whole.tokens_per_forward_mean == pytest.approx((11 / 9 + 3 / 2) / 2)
    assert whole.tokens_per_forward_pooled == pytest.approx(14 / 11)
    assert by_arm(found, "chat")["chain"].prompts == 1


def test_the_summary_weighs_domains_alike() -> None:
    # Chat answers are three times as long: pooled times would drown the other domain.
    chat = tuple(
        run(arm, 1, repeat, 31, 100.0, {"stock": 3000.0, "ar": 1450.0, "chain": 6100.0}[arm])
        for repeat in (0, 1)
        for arm in ("stock", "ar", "chain")
    )
    ar, chain = summaries(HAND_MADE + chat)

    # 3 on math and 0.5 on chat; against plain decoding 3, and 1 / 4.
    assert chain.speedup_vs_stock_geomean.value == pytest.approx(1.5**0.5)
    assert chain.speedup_vs_ar_geomean.value == pytest.approx(0.75**0.5)
    assert chain.worst_domain == ("chat", pytest.approx(0.5))
    assert (ar.arm, ar.worst_domain) == ("ar", ("math", 1.0))


def test_temperatures_are_apart() -> None:
    warm = tuple(
        replace(
            r, temperature=1.0, decode_ms=r.decode_ms / (2 if r.arm == "chain" else 1), equal_to_plain=None
        )
        for r in HAND_MADE
    )
    made = report(HAND_MADE + warm)
    made.options["temperatures"] = [0.0, 1.0]

    assert [(row.temperature, row.arm) for row in made.overall] == [
        (t, arm) for t in (0.0, 1.0) for arm in ("stock", "ar", "chain")
    ]
    assert made.rows[:3] == report().rows
    assert (made.rows[2].tpot_ms.median, made.rows[5].tpot_ms.median) == (40.0, 20.0)
    assert [(s.temperature, s.arm) for s in made.summaries] == [
        (0.0, "ar"), (0.0, "chain"), (1.0, "ar"), (1.0, "chain")
    ]  # fmt: skip
    assert "### Greedy" in made.to_markdown()
    assert "### Temperature 1" in made.to_markdown()
    assert "greedy and temperature 1," in made.title
    (same,) = (
        c for c in compare_reports(made, report()).changes if c.arm == "chain" and c.metric == "tpot_ms"
    )
    assert (same.temperature, same.ratio) == (0.0, 1.0)


def test_the_table_fits_a_terminal_whatever_the_strategies() -> None:
    names = ("stock", *STRATEGIES)
    domains = ("math", "code", "chat", "creative", "summary")
    runs = tuple(
        replace(run(arm, 0, 0, 900, 111.0, 12345.0), domain=domain, prompt_index=i)
        for i, domain in enumerate(domains)
        for arm in names
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report(runs).to_table())
    text = console.export_text()

    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    for arm in names:
        shown = sum(line[:1] == [arm] and len(line) > 3 for line in lines)
        assert shown == len(domains) + 1 + (arm != "stock") + 1
    assert [
        "fused_tree",
        "1.00",
        "1.00",
        "1.0",
        "1.00",
        "[1.00,",
        "1.00]",
        "1.00",
        "[1.00,",
        "1.00]",
        "5/5",
    ] in lines
    assert [line for line in lines if line == ["all"]]


def test_runs_of_one_token_divide_by_nothing() -> None:
    ended = tuple(run(arm, 0, 0, 1, 10.0, 0.0) for arm in ("stock", "ar", "chain"))
    row = by_arm(rows(ended))["chain"]

    assert (row.tokens_per_cycle_mean, row.tokens_per_cycle_pooled, row.tpot_ms.median) == (0.0, 0.0, 0.0)
    assert row.tokens_per_forward_mean == 1.0


def test_equality_needs_every_repeat() -> None:
    other = replace(HAND_MADE[-1], equal_to_plain=False)

    assert by_arm(rows((*HAND_MADE[:-1], other)))["chain"].equal_to_plain == (0, 1)
    assert by_arm(rows(HAND_MADE))["chain"].equal_to_plain == (1, 1)
    sampled = [replace(r, equal_to_plain=None) for r in HAND_MADE]
    assert by_arm(rows(sampled))["chain"].equal_to_plain is None


def test_every_form_says_the_same() -> None:
    made = report()
    raw = json.loads(json.dumps(made.to_dict()))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(made.to_table())

    text, markdown = console.export_text(), made.to_markdown()
    for shown in (text, markdown):
        # One prompt has no interval.
        assert "3.00" in shown
        assert "3.00 [" not in shown
        assert "1/1" in shown
    assert all(formula in markdown for name, formula in LEGEND.items())
    assert raw["legend"] == LEGEND
    assert {"provenance", "model", "options", "runs"} <= raw.keys()
    line = list(csv.DictReader(io.StringIO(made.to_csv())))[2]
    assert (line["arm"], line["speedup_vs_stock_value"], line["accepted_histogram"]) == (
        "chain",
        "3.0000",
        "2 2 2 2",
    )
    assert BenchReport.from_dict(raw).rows == made.rows


def test_every_number_has_a_formula() -> None:
    numbers = {*Row.__slots__, *Summary.__slots__} - {"arm", "domain", "temperature", "prompts"}

    assert numbers == set(LEGEND)


def test_comparing(tmp_path: Path) -> None:
    faster = tuple(replace(r, decode_ms=r.decode_ms / 2) if r.arm == "chain" else r for r in HAND_MADE)
    path = tmp_path / "b.json"
    path.write_text(json.dumps(report(faster, threads=2, model={"dtype": "bfloat16"}).to_dict()))
    found = compare_reports(report().to_dict(), path)

    (tpot,) = (c for c in found.changes if c.arm == "chain" and c.metric == "tpot_ms")
    assert (tpot.a, tpot.b, tpot.ratio, tpot.clear) == (40.0, 20.0, 0.5, True)
    (same,) = (c for c in found.changes if c.arm == "stock" and c.metric == "tpot_ms")
    assert (same.ratio, same.clear) == (1.0, False)
    assert found.differences == ("dtype: float32 / bfloat16", "threads: 1 / 2")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(found)
    assert "0.500*" in console.export_text()
    assert "- differs: threads: 1 / 2" in found.to_markdown()
    json.dumps(found.to_dict())


def test_what_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    whole = report().to_dict()
    damaged = [whole | {"model": wrong} for wrong in ("abc", [[1, 2, 3]], {}, [], 5)]
    damaged += [whole | {"options": "abc"}, whole | {"options": {}}, whole | {"provenance": [[1]]}]
    texts = [
        "{}",
        "[]",
        "not json",
        "[" * 100_000,
        '{"kind": "orthrus-bench", "format_version": 2, "runs": [{}]}',
    ]
    for text in (*texts, *map(json.dumps, damaged)):
        path.write_text(text)
        with pytest.raises(UserInputError, match=r"x\.json"):
            read_report(path)
    with pytest.raises(UserInputError):
        compare_reports(tmp_path / "none.json", path)
