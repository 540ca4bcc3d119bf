"""The tables of README.md, from the files in benchmarks/results: python benchmarks/readme_tables.py [--check]

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`, and is written anew each time. With
--check nothing is written, and exit status 1 says that a table is not that of its files.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import write_text_atomic
from orthrus.bench.arms import PLAIN
from orthrus.bench.report import BenchReport, read_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md",)
NAMES = {
    "gsm8k": "GSM8K",
    "math500": "MATH-500",
    "humaneval": "HumanEval",
    "mbpp": "MBPP",
    "mt_bench": "MT-Bench",
    "all": "all",
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


def measured(dtype: str) -> tuple[str, BenchReport]:
    """The result of `make bench` in a precision, or that of the release before it."""
    before = "" if dtype == "float32" else f"{dtype}-"
    names = (f"readme-{dtype}-cpu.json", f"bench-{before}avx512-cpu.json")
    name = next(name for name in names if (RESULTS / name).is_file())
    return name, read_report(RESULTS / name)


def time_table() -> str:
    """`auto` over plain decoding by domain, and over the stock model, in three precisions."""
    found = {dtype: measured(dtype) for dtype in DTYPES}
    domains = list(dict.fromkeys(run.domain for _, report in found.values() for run in report.runs))
    lines = []
    for dtype, (_, report) in found.items():
        rows = {row.domain: row for row in report.rows if row.arm == "auto" and row.temperature == 0.0}
        ours = {line.arm: line for line in report.summaries if line.temperature == 0.0}
        auto, plain = ours["auto"].speedup_vs_stock_geomean, ours[PLAIN].speedup_vs_stock_geomean
        lines.append(
            [
                dtype,
                *(f"{rows[d].speedup_vs_ar.value:.2f}" if d in rows else "–" for d in domains),
                f"{rows['all'].tokens_per_second.median:.0f}",
                f"{plain.value:.2f}",
                f"{auto.value:.2f} [{auto.low:.2f}, {auto.high:.2f}]",
            ]
        )
    # Before sets had names, a file of five of them called this one by its kind.
    names = {**NAMES, "math": "MATH-500"} if next(iter(found.values()))[0].startswith("bench-") else NAMES
    titles = [names.get(domain, domain) for domain in domains]
    head = ["", *titles, "tokens a second", "plain over stock", "`auto` over stock [95 %]"]
    options = next(iter(found.values()))[1].options
    files = ", ".join(f"`{name}`" for name, _ in found.values())
    return (
        f"{files}: {options['num_prompts']} prompts, at most {options['max_new_tokens']} tokens, repeats: "
        f"{options['repeats']}.\n\n{markdown_table(head, lines, 'l' + 'r' * (len(head) - 1))}\n"
    )


def llama_table() -> str:
    """Against llama.cpp, by prompt: the first half is of one set, the second of the other."""
    raw: dict[str, Any] = json.loads(
        (RESULTS / "against-llama-cpp-avx512-cpu.json").read_text(encoding="utf-8")
    )
    each = raw["options"]["limit"]
    lines = []
    for setting, row in raw["results"].items():
        if "ratio" not in row:
            continue
        dtype, _, strategy = setting.split(", ")
        cells = [
            f"{median(row[name]['by_prompt'][part]):.2f}"
            for part in (slice(0, each), slice(each, None))
            for name in ("ratio", "decode_ratio")
        ]
        name = "plain decoding" if strategy == PLAIN else f"`{strategy}`"
        lines.append([f"{dtype}, {name}", *cells, f"{row['decode_tokens_per_second']:.0f}"])
    head = ["", "GSM8K", "decoding alone", "HumanEval", "decoding alone", "decodes, tokens a second"]
    return markdown_table(head, lines, "l" + "r" * 5) + "\n"


def drafts_table() -> str:
    """Acceptance of `chain` in float32, and of the trees with forty nodes."""
    trees = json.loads((RESULTS / "acceptance-40-nodes-cpu.json").read_text(encoding="utf-8"))["results"]
    lines = []
    for name, title in (
        ("gsm8k", "GSM8K"),
        ("humaneval", "HumanEval"),
        ("mt_bench", "MT-Bench, first turns"),
    ):
        raw = json.loads((RESULTS / f"acceptance-{name}-cpu.json").read_text(encoding="utf-8"))
        chain = raw["results"]["chain"][name]
        values = (
            chain["tokens_per_cycle"],
            chain["tokens_per_forward"],
            trees["tree"][name]["tokens_per_cycle"],
            trees["fused_tree"][name]["tokens_per_forward_mean"],
        )
        lines.append([title, *(f"{value:.2f}" for value in values)])
    head = ["", "`chain`, tokens per cycle", "`chain`, tokens per forward"]
    head += ["`tree`, tokens per cycle", "`fused_tree`, tokens per forward"]
    return markdown_table(head, lines, "lrrrr") + "\n"


TABLES: dict[str, Callable[[], str]] = {"time": time_table, "llama": llama_table, "drafts": drafts_table}


if __name__ == "__main__":
    typer.run(main)
