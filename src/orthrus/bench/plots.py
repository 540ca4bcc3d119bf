"""Makes the plots of a set of results. Each caption says what the plot shows, and by which formula."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from orthrus.bench.arms import PLAIN, STOCK, Arm
from orthrus.bench.layout import sampling_name
from orthrus.bench.metrics import ALL, Row
from orthrus.bench.records import by_temperature
from orthrus.bench.report import BenchReport
from orthrus.bench.suites import PAPER_CYCLE
from orthrus.bench.svg import BLACK, COLOURS, Axis, Bar, Bars, Lines, Series

_STEPS = (STOCK, PLAIN, PAPER_CYCLE, "chain", "tree", "fused_tree", "auto")
_NAMES = {
    STOCK: "stock generate",
    PLAIN: "plain",
    PAPER_CYCLE: "the paper's chain",
    "chain": "chain with floor",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """`key`: the name of its file. `caption`: what it shows, and by which formula. `source`: the file of its data."""

    key: str
    title: str
    caption: str
    source: str
    drawing: Lines | Bars

    def svg(self) -> str:
        return self.drawing.svg(self.title)


def plots_of_bench(source: str, report: BenchReport) -> Iterator[Plot]:
    """The plots for which a benchmark has the data, greedy first."""
    for temperature, rows in by_temperature(report.rows):
        named = sampling_name(temperature)
        for make in (_waterfall, _positions, _break_even, _block_lengths):
            plot = make(rows, report)
            if plot is not None:
                key, title, caption, drawing = plot
                yield Plot(f"{key}-{named.replace(' ', '-')}", f"{title} ({named})", caption, source, drawing)


_Found = tuple[str, str, str, Lines | Bars] | None


def _waterfall(rows: Sequence[Row], _: BenchReport) -> _Found:
    overall = {row.arm: row for row in rows if row.domain == ALL}
    bars = []
    for arm in _STEPS:
        if arm in overall:
            found = overall[arm].speedup_vs_stock
            bars.append(Bar(_NAMES.get(arm, arm), found.value, found.low, found.high))
    if len(bars) < 3:
        return None
    return (
        "waterfall",
        "From the stock model to auto",
        "Speed-up over the stock model's own generate: ratio of times per token, first token included, geometric "
        "mean over prompts; whiskers: 95 % over prompts.",
        Bars(Axis("times stock"), bars),
    )


def _positions(rows: Sequence[Row], _: BenchReport) -> _Found:
    arm = next((a for a in ("chain", PAPER_CYCLE) if any(row.arm == a for row in rows)), None)
    shown = [row for row in rows if row.arm == arm and row.acceptance_by_position]
    styles = cycle(style for style in range(len(COLOURS)) if style != BLACK)
    series = [
        Series(
            row.domain,
            list(enumerate(row.acceptance_by_position, start=1)),
            style=BLACK if row.domain == ALL else next(styles),
        )
        for row in sorted(shown, key=lambda row: row.domain == ALL)
    ]
    if not series:
        return None
    return (
        "positions",
        "Acceptance by position and domain",
        f"{_NAMES.get(str(arm), arm)}: of the cycles in which all drafts before position j were accepted, the share in "
        "which draft j was accepted too. With the floor, draft 1 is the second token after the anchor. Few cycles "
        "reach far positions.",
        Lines(
            Axis("position of the draft", whole=True), Axis("accepted, given all before", 0.0, 1.0), series
        ),
    )


def _break_even(rows: Sequence[Row], _: BenchReport) -> _Found:
    plain = {row.domain: row for row in rows if row.arm == PLAIN}
    arms = [a for a in dict.fromkeys(row.arm for row in rows) if a not in (STOCK, PLAIN)]
    series: list[Series] = []
    furthest = 1.0
    for style, arm in enumerate(arms):
        points, costs = [], []
        for row in rows:
            if row.arm == arm and row.domain in plain and row.tpot_ms.median:
                speedup = plain[row.domain].tpot_ms.median / row.tpot_ms.median
                points.append((row.tokens_per_cycle_pooled, speedup))
                if row.domain == ALL:
                    costs.append(row.tokens_per_cycle_pooled / speedup)
        if not points or not costs:
            continue
        furthest = max(furthest, *(x for x, _ in points))
        series.append(Series(f"{arm} ({costs[0]:.2f})", points, is_line=False, style=style))
        reach = max(x for x, _ in points)
        line = [(1.0, 1.0 / costs[0]), (reach, reach / costs[0])]
        series.append(Series("", line, marks=False, style=style))
    if not series:
        return None
    return (
        "break-even",
        "Speed-up against tokens per cycle",
        "Each mark is a domain. Across: (tokens - 1) / cycles; up: decoding time per token of plain / of the arm. "
        "In brackets, and as the line of that arm: what a cycle costs, in plain passes, over all prompts. Where the "
        "line meets 1, drafting breaks even.",
        Lines(
            Axis("tokens per cycle", 0.8),
            Axis("times plain, decoding", 0.0),
            series,
            levels=[(1.0, "break-even")],
        ),
    )


def _block_lengths(rows: Sequence[Row], report: BenchReport) -> _Found:
    overall = {row.arm: row for row in rows if row.domain == ALL}
    trained = int(report.options.get("block_size") or report.model["block_size"])
    found: list[tuple[int, Row]] = []
    for arm, row in overall.items():
        if arm != STOCK:
            parsed = Arm.parse(arm)
            if parsed.strategy == "chain" and parsed.settings.keys() <= {"block_size"}:
                found.append((int(parsed.settings.get("block_size", trained)), row))
    if len(found) < 2 or PLAIN not in overall:
        return None
    found.sort(key=lambda pair: pair[0])
    step = overall[PLAIN].tpot_ms.median
    costs = [(size, row.tpot_ms.median * row.tokens_per_cycle_pooled / step) for size, row in found]
    return (
        "block-length",
        "Block length against cost",
        "chain with blocks of several lengths: tokens that a cycle commits, and what it costs: time of a cycle / "
        "time of a plain pass. The distance between the two is the gain.",
        Lines(
            Axis("rows of a block", log2=True),
            Axis("tokens; plain passes", 0.0),
            [
                Series("tokens per cycle", [(n, row.tokens_per_cycle_pooled) for n, row in found]),
                Series("cost of a cycle", costs),
            ],
        ),
    )


def plots_of_context(source: str, raw: dict[str, Any]) -> Iterator[Plot]:
    """The plots of a result of benchmarks/long_context.py."""
    by_strategy: dict[str, list[dict[str, Any]]] = {}
    for row in raw["results"]:
        by_strategy.setdefault(row["strategy"], []).append(row)
    series = [
        Series(
            name,
            [(row["context"], row["ratio"]["median"]) for row in rows],
            [(row["ratio"]["low"], row["ratio"]["high"]) for row in rows],
        )
        for name, rows in by_strategy.items()
    ]
    yield Plot(
        "context",
        "Time of a cycle by context length",
        "Time of one cycle after so many tokens / after the fewest, in the same repeat; whiskers: all repeats.",
        source,
        Lines(Axis("tokens of context", log2=True), Axis("times the shortest", 0.0), series),
    )


def plots_of_training(source: str, raw: dict[str, Any]) -> Iterator[Plot]:
    """The plots of a curve: `points` with `targets` and `tokens_per_cycle`, and an `arm` if there are several."""
    arms: dict[str, list[tuple[float, float]]] = {}
    for point in raw["points"]:
        arms.setdefault(str(point.get("arm", "view")), []).append(
            (float(point["targets"]), float(point["tokens_per_cycle"]))
        )
    yield Plot(
        "training",
        "Acceptance against training targets",
        "Tokens per cycle of the decoded text, own tokens included, after so many supervised draft rows.",
        source,
        Lines(
            Axis("training targets", log2=True),
            Axis("tokens per cycle"),
            [Series(name, sorted(points)) for name, points in arms.items()],
        ),
    )


def plots_of_sceptic(source: str, raw: dict[str, Any]) -> Iterator[Plot]:
    """The plots of a result of benchmarks/sceptic.py, one for each data set."""
    for name, arms in raw["results"].items():
        yield Plot(
            f"accuracy-{name}",
            f"Speed against accuracy ({name})",
            "Right answers / prompts, with the 95 % interval (Clopper-Pearson); across: new tokens / passes, prompts' "
            "passes included. unverified: the view's drafts taken as they are.",
            source,
            Lines(
                Axis("tokens per pass", 0.0),
                Axis("right answers", 0.0),
                [
                    Series(
                        arm,
                        [(row["tokens_per_pass"], row["accuracy"])],
                        [tuple(row["interval"])],
                        is_line=False,
                    )
                    for arm, row in arms.items()
                ],
            ),
        )
