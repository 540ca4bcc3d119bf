"""Makes one self-contained page of results: plots, tables, formulas, and the origin of each number."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from orthrus.base.json_text import parse_json
from orthrus.bench.arms import PLAIN, STOCK
from orthrus.bench.layout import SHOWN, cells, sampling_name
from orthrus.bench.legend import LEGEND
from orthrus.bench.machine import NOT_AVAILABLE
from orthrus.bench.metrics import ALL, Row
from orthrus.bench.plots import Plot, plots_of_bench, plots_of_context, plots_of_sceptic, plots_of_training
from orthrus.bench.records import by_temperature
from orthrus.bench.report import KIND, BenchReport
from orthrus.errors import UserInputError

AUDIT = "orthrus-audit"
_OTHERS: dict[str, Callable[[str, dict[str, Any]], Iterator[Plot]]] = {
    "orthrus-long-context": plots_of_context,
    "orthrus-training-curve": plots_of_training,
    "orthrus-sceptic": plots_of_sceptic,
    # An audit has a table, and no plots.
    AUDIT: lambda source, raw: iter(()),
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
figure { margin: 1.5rem 0; break-inside: avoid; } figure svg { max-width: 100%; height: auto; }
figcaption { color: #333; font-size: 0.9rem; max-width: 45rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 0.5rem 0; font-variant-numeric: tabular-nums; }
th, td { white-space: nowrap; padding: 0.2rem 0.6rem; border-bottom: 1px solid #ccc; text-align: right; }
th { text-align: left; border-bottom: 1px solid #333; } td.name { text-align: left; }
dl { font-size: 0.85rem; } dt { font-family: ui-monospace, monospace; } dd { margin: 0 0 0.4rem 1.5rem; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } h2 { break-after: avoid; }
  .wide { overflow: visible; } table { font-size: 0.55rem; } th, td { white-space: normal; padding: 0.1rem 0.25rem; } }
"""


@dataclass(frozen=True, slots=True)
class Page:
    """`html`: the page. `plots`: its pictures, each with a key of its own."""

    html: str
    plots: tuple[Plot, ...]


def make_page(files: Sequence[Path]) -> Page:
    """The page of results of `orthrus bench` and of benchmarks/, in their order.

    Raises UserInputError for a file that cannot be read, has another kind, or lacks entries of its kind.
    """
    results = [(file.name, *_read(file)) for file in files]
    plots: list[Plot] = []
    sections: list[str] = []
    for source, raw, bench in results:
        try:
            made = list(_OTHERS[raw["kind"]](source, raw) if bench is None else plots_of_bench(source, bench))
            tables = _audit(raw) if raw["kind"] == AUDIT else _tables(bench)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserInputError(f"{source} is damaged ({error!r}); make it again.") from error
        taken = {plot.key for plot in plots}
        named = Path(source).stem
        made = [p if p.key not in taken else replace(p, key=f"{p.key}-{named}") for p in made]
        plots += made
        title = f"<h2>{escape(source)}</h2>"
        figures = "".join(map(_figure, made))
        sections.append(title + figures + tables + _origin(raw))
    legend = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in LEGEND.items())
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Orthrus: measured</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        "<h1>Orthrus: measured</h1><p>Every figure comes from a file named above it, and its formula is below. "
        "Both sides of a ratio took turns in one run on one machine.</p>"
        f"{''.join(sections)}<h2>Formulas</h2><dl>{legend}</dl></body></html>\n"
    )
    return Page(html, tuple(plots))


def _read(file: Path) -> tuple[dict[str, Any], BenchReport | None]:
    try:
        raw = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserInputError(f"cannot read {file} as a result; give JSON that a benchmark wrote.") from error
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if kind == KIND:
        try:
            return raw, BenchReport.from_dict(raw)
        except UserInputError as error:
            raise UserInputError(f"{file}: {error}") from error
    if kind not in _OTHERS:
        raise UserInputError(
            f"{file} is of no kind that a page shows; there are {', '.join([KIND, *_OTHERS])} ('kind' of the file)."
        )
    return raw, None


def _figure(plot: Plot) -> str:
    return (
        f'<figure id="{escape(plot.key, quote=True)}"><h3>{escape(plot.title)}</h3>{plot.svg()}'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _tables(bench: BenchReport | None) -> str:
    if bench is None:
        return ""
    parts = [f"<p>{escape(bench.title)}</p>"]
    if not bench.is_complete:
        parts.append("<p><strong>This run is unfinished.</strong></p>")
    for temperature, rows in by_temperature(bench.rows):
        overall = [row for row in rows if row.domain == ALL]
        named = sampling_name(temperature)
        body = [[row.domain, row.arm, *cells(row)] for row in rows]
        parts += [
            f"<h3>By domain ({named})</h3>",
            _table(["domain", "arm", *(name.replace("_", " ") for name in SHOWN)], body, 2),
            f"<p>{escape(_losses(rows))}</p>",
            f"<h3>What a token costs ({named})</h3>",
            _table(
                ["arm", "GFLOP", "over plain", "GB moved", "over plain", "joules", "peak GB"],
                list(_costs(overall)),
                1,
            ),
        ]
    return "".join(parts)


def _audit(raw: dict[str, Any]) -> str:
    """Whether outputs changed."""
    head = ["strategy", "prompts", "identical", "near-ties", "broken rules"]
    names = ("num_prompts", "num_identical", "num_near_ties", "num_broken")
    body = [[str(s["strategy"]), *(str(s[name]) for name in names)] for s in raw["strategies"]]
    bounds = "".join(f"<li>{escape(s['bound'])}</li>" for s in raw["strategies"] if "bound" in s)
    return f"<p>{escape(str(raw['summary']))}</p>{_table(head, body, 1)}<ul>{bounds}</ul>"


def _losses(rows: Sequence[Row]) -> str:
    """Said aloud, where drafting does not pay."""
    slower = [
        f"{row.arm} on {row.domain} ({row.speedup_vs_ar.value:.2f})"
        for row in rows
        if row.domain != ALL and row.arm not in (STOCK, PLAIN) and row.speedup_vs_ar.value < 1.0
    ]
    if not slower:
        return "No strategy is slower than plain decoding in any domain."
    return f"Slower than plain decoding: {', '.join(slower)}."


def _costs(overall: Sequence[Row]) -> Iterable[list[str]]:
    plain = next((row for row in overall if row.arm == PLAIN), None)
    for row in overall:
        yield [
            row.arm,
            *_amount(row.flops_per_token, None if plain is None else plain.flops_per_token),
            *_amount(row.bytes_per_token, None if plain is None else plain.bytes_per_token),
            NOT_AVAILABLE if row.joules_per_token is None else f"{row.joules_per_token:.2f}",
            NOT_AVAILABLE if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}",
        ]


def _amount(value: float | None, plain: float | None) -> tuple[str, str]:
    if value is None or not plain:
        return NOT_AVAILABLE, "–"
    return f"{value / 1e9:.3f}", f"{value / plain:.2f}"


def _table(head: Sequence[str], body: Iterable[Sequence[str]], names: int) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=name' if column < names else ''}>{escape(cell)}</td>"
            for column, cell in enumerate(line)
        )
        + "</tr>"
        for line in body
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _origin(raw: dict[str, Any]) -> str:
    """What made the numbers."""
    made = raw.get("provenance") or {}
    facts = {
        "command": made.get("command"),
        "commit": f"{made.get('git_commit')}{', with changes' if made.get('git_dirty') else ''}",
        "versions": ", ".join(f"{name} {number}" for name, number in (made.get("versions") or {}).items()),
        "machine": f"{made.get('cpu')}, {made.get('threads')} threads, {made.get('device')}, {made.get('dtype')}",
        "seed": made.get("seed"),
        "time": made.get("time"),
    }
    lines = "".join(
        f"<dt>{name}</dt><dd><code>{escape(str(value))}</code></dd>" for name, value in facts.items()
    )
    return f"<h3>Where it comes from</h3><dl>{lines}</dl>"
