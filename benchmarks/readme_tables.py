"""Tables of README.md and docs/measured.md, from benchmarks/results: python benchmarks/readme_tables.py [--check]

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`, and is written anew each time. With
--check nothing is written, and exit status 1 says that a table is not that of its files.
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import write_text_atomic
from orthrus.bench.arms import PLAIN, STOCK
from orthrus.bench.layout import interval_text
from orthrus.bench.metrics import ALL, Row
from orthrus.bench.report import BenchReport, read_report
from orthrus.bench.statistics import Interval

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/measured.md")
LLAMA = "against-llama-cpp-avx512-cpu.json"
MISSING = "not measured"
NO_INT8 = "none"
"""transformers has no int8 of its own on a CPU, and our int8 linears, run by it, are no rival."""
NAMES = {
    "gsm8k": "GSM8K",
    "math500": "MATH-500",
    "humaneval": "HumanEval",
    "mbpp": "MBPP",
    "mt_bench": "MT-Bench (first turns)",
}
REGION = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
DTYPES = ("float32", "bfloat16", "int8")


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; say whether tables are current.")
    ] = False,
) -> None:
    """Write the tables of the pages anew."""
    stale = []
    for page in PAGES:
        old = (ROOT / page).read_text(encoding="utf-8")
        new = with_tables(old)
        if new != old:
            stale.append(page)
            if not check:
                write_text_atomic(ROOT / page, new)
    typer.echo(
        f"{'not current' if check else 'written'}: {', '.join(stale)}" if stale else "all tables are current"
    )
    raise typer.Exit(int(check and bool(stale)))


def with_tables(text: str) -> str:
    """The text with each table made anew; KeyError for a table that nobody makes."""
    return REGION.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[4]}", text)


@cache
def measured(dtype: str, machine: str = "") -> tuple[str, BenchReport]:
    """The result of `make bench` in a precision. machine: what the name of its file adds, such as "-intel"."""
    name = f"readme-{dtype}{machine}-cpu.json"
    return name, read_report(RESULTS / name)


def overall(report: BenchReport) -> dict[str, Row]:
    """Greedy rows over all prompts, by arm."""
    return {row.arm: row for row in report.overall if row.temperature == 0.0}


def by_domain(report: BenchReport, arm: str) -> dict[str, float]:
    """Greedy speed-ups of an arm over plain decoding."""
    rows = [row for row in report.rows if (row.arm, row.temperature) == (arm, 0.0)]
    found = {row.domain: row.speedup_vs_ar.value for row in rows if row.domain != ALL}
    return found or {row.domain: row.speedup_vs_ar.value for row in rows}


def over_stock(report: BenchReport) -> dict[str, Interval]:
    """Greedy speed-ups over the stock model, domains alike, by arm."""
    return {s.arm: s.speedup_vs_stock_geomean for s in report.summaries if s.temperature == 0.0}


def measured_table() -> str:
    """What the README shows: tokens a second, and `auto` over all that it is compared with."""
    llama = over_llama()
    lines = []
    for dtype in DTYPES:
        report = measured(dtype)[1]
        rows, over_plain = overall(report), by_domain(report, "auto").values()
        speeds = [f"{rows[arm].tokens_per_second.median:.0f}" for arm in (STOCK, PLAIN, "auto")]
        auto = over_stock(report)["auto"]
        interval = interval_text(auto)
        if dtype == "int8":
            speeds[0] = interval = NO_INT8
        span = f"{min(over_plain):.2f} to {max(over_plain):.2f}"
        lines.append([dtype, *speeds, interval, span, llama.pop(dtype, MISSING)])
    others = "; ".join(f"in {dtype}: {ratios}" for dtype, ratios in llama.items())
    head = ["precision", "transformers", "our plain decoding", "`auto`", "over transformers [95 %]"]
    table = markdown_table(
        [*head, "over our plain decoding, worst to best data set", "over llama.cpp in 4 bits"], lines
    )
    return f"{table}\n\n{caption()}\nOver llama.cpp {others}.\n"


def caption(machine: str = "") -> str:
    """What the measurement was made of."""
    found = [measured(dtype, machine) for dtype in DTYPES]
    report = found[0][1]
    domains = dict.fromkeys(run.domain for run in report.runs)
    return (
        f"{report.options['num_prompts']} prompts of {', '.join(set_names(domains))}; greedy; at most "
        f"{report.options['max_new_tokens']} tokens; repeats: {report.options['repeats']}; "
        f"{report.provenance['cpu']}, {report.provenance['threads']} threads\n"
        f"({', '.join(f'`{name}`' for name, _ in found)})."
    )


def set_names(domains: Iterable[str]) -> list[str]:
    """How the sets are called."""
    return [NAMES.get(domain, domain) for domain in domains]


def over_llama() -> dict[str, str]:
    """By precision: `auto` over llama.cpp on the two sets, first tokens included; half of the prompts are each's."""
    raw: dict[str, Any] = json.loads((RESULTS / LLAMA).read_text(encoding="utf-8"))
    each, found = raw["options"]["limit"], {}
    for setting, row in raw["results"].items():
        if setting.endswith(", auto"):
            ratios = row["ratio"]["by_prompt"]
            halves = (median(ratios[:each]), median(ratios[each:]))
            found[setting.split(", ")[0]] = ", ".join(f"{ratio:.2f}" for ratio in halves)
    return found


def over_stock_table(machine: str = "") -> str:
    """Every arm over the stock model, where it has the precision too."""
    found = {dtype: over_stock(measured(dtype, machine)[1]) for dtype in DTYPES if dtype != "int8"}
    arms = list(dict.fromkeys(arm for each in found.values() for arm in each))
    lines = [
        [dtype, *(f"{each[arm].value:.2f}" if arm in each else MISSING for arm in arms)]
        for dtype, each in found.items()
    ]
    table = markdown_table(["", *("plain" if arm == PLAIN else f"`{arm}`" for arm in arms)], lines)
    return f"{table}\n\n{caption(machine)}\n"


def over_plain_table(machine: str = "") -> str:
    """Every drafting arm over plain decoding, by set, in three precisions."""
    found = {dtype: measured(dtype, machine) for dtype in DTYPES}
    domains = list(dict.fromkeys(run.domain for _, report in found.values() for run in report.runs))
    lines = []
    for dtype, (_, report) in found.items():
        for arm in report.options["strategies"]:
            values = by_domain(report, arm)
            cells = (f"{values[d]:.2f}" if d in values else MISSING for d in domains)
            lines.append([f"{dtype}, `{arm}`", *cells])
    return markdown_table(["", *set_names(domains)], lines) + "\n"


def strategies_table() -> str:
    """Acceptance of chain and trees with forty nodes."""
    raw = json.loads((RESULTS / "acceptance-40-nodes-cpu.json").read_text(encoding="utf-8"))["results"]
    cycle, forward = "tokens_per_cycle", "tokens_per_forward_mean"
    columns = (
        ("chain", cycle),
        ("tree", cycle),
        ("chain", forward),
        ("tree", forward),
        ("fused_tree", forward),
    )
    lines = [
        [NAMES[name], *(f"{raw[strategy][name][metric]:.2f}" for strategy, metric in columns)]
        for name in raw["chain"]
    ]
    head = [
        "",
        "`chain`, tokens per cycle",
        "`tree`",
        "`chain`, tokens per forward",
        "`tree`",
        "`fused_tree`",
    ]
    return markdown_table(head, lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "measured": measured_table,
    "over_stock": over_stock_table,
    "over_plain": over_plain_table,
    "over_stock_intel": partial(over_stock_table, "-intel"),
    "over_plain_intel": partial(over_plain_table, "-intel"),
    "strategies": strategies_table,
}


if __name__ == "__main__":
    typer.run(main)
