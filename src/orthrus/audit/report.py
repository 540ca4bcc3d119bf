"""The report of an audit: the verdict, the counts, and every difference with its explanation."""

import csv
import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from orthrus.audit.explain import MARGIN, NUM_CANDIDATES, Verdict
from orthrus.audit.full_report import FULL_LEGEND, FullReport, bound
from orthrus.base.markdown import markdown_table

LEGEND = {
    "baseline": "stock: the stock model's own generate, which draws a sampled text with the same noise; "
    "plain: strategy ar by the same runner; one prompt at a time, whatever the concurrency of ours",
    "identical": "prompts whose tokens all equal the baseline's",
    "score": "a logit; for a sampled text logit / temperature - log(noise of the draw): the best is chosen",
    "near_ties": f"prompts whose first difference has a gap of at most {MARGIN:g} x rounding_spread, because each "
    "of the two scores may move by that",
    "broken": "prompts whose first difference rounding cannot explain; the audit fails if there is one or more",
    "gap": "score of the baseline's token - score of ours, computed by the baseline one row at a time",
    "rounding_spread": f"largest change of a score, among the top {NUM_CANDIDATES} candidates, when the baseline "
    "computes the same position in passes of other shapes: as many rows as ours, blocks, all at once",
    "drift": "the same change between the baseline's one-row scores and ours; for information",
    "residue": "the same change between our scores and the baseline's in passes of as many rows as ours; 0 where "
    "they agree to the bit; for information",
    "acceptance_rate": "accepted drafts / verified drafts; a broken drafter gives right text, but slowly",
    "tokens_per_forward": "sum of tokens / sum of passes, prefill, draft and verify",
}


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first difference between two outputs.

    `position` counts new tokens from 0. gap, rounding_spread, drift and residue are scores, which `LEGEND` defines. A
    token is None where that output has ended.
    """

    strategy: str
    prompt_index: int
    position: int
    baseline_token: int | None
    our_token: int | None
    baseline_text: str
    our_text: str
    gap: float | None
    rounding_spread: float | None
    drift: float | None
    residue: float | None
    spread_by_shape: dict[str, float]
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class StrategyResult:
    """Counts of prompts, and how the drafts fared. `acceptance_rate` is None when nothing was drafted."""

    strategy: str
    num_prompts: int
    num_identical: int
    num_near_ties: int
    num_broken: int
    num_tokens: int
    acceptance_rate: float | None
    tokens_per_forward: float

    @property
    def bound(self) -> str:
        """The upper bound on the rate of differences, as a clause."""
        return f"{self.strategy}: {bound(self.num_prompts - self.num_identical, self.num_prompts, 'outputs')}"


@dataclass(frozen=True)
class AuditReport:
    """The results of an audit.

    `damages`: sentences on slot caches that broke their invariant. `faults`: sentences on what is wrong with the model
    itself. `full`: the tests of sampled text, if they were asked for.
    """

    strategies: tuple[StrategyResult, ...]
    mismatches: tuple[Mismatch, ...]
    damages: tuple[str, ...]
    model: dict[str, Any]
    options: dict[str, Any]
    provenance: dict[str, Any]
    faults: tuple[str, ...] = ()
    full: FullReport | None = None

    @property
    def passed(self) -> bool:
        """Whether no rule is broken, no cache is damaged, the model has no fault, and no test of sampled text failed.

        Near-ties do not count.
        """
        is_sound = not (self.damages or self.faults or (self.full is not None and self.full.failures))
        return is_sound and not any(s.num_broken for s in self.strategies)

    @property
    def summary(self) -> str:
        """The verdict in one sentence."""
        m = self.model
        runs = sum(s.num_prompts for s in self.strategies)
        same = sum(s.num_identical for s in self.strategies)
        ties = sum(s.num_near_ties for s in self.strategies)
        broken = sum(s.num_broken for s in self.strategies)
        plain = f"plain decoding by the {m['runner']} runner"
        whose = plain if self.options["against"] == "plain" else "the stock model's"
        return (
            f"{'PASSED' if self.passed else 'FAILED'}: {same} of {runs} outputs identical to {whose}, "
            f"{ties} near-ties, {broken} broken rules, {len(self.damages)} damaged caches "
            f"({m['model']}, {m['dtype']} on {m['device']}, {m['view']} view{self._company}).{self._quantised}"
            f"{''.join(f' Fault: {fault}.' for fault in self.faults)}"
            f"{f' {self.full.summary[0].upper()}{self.full.summary[1:]}' if self.full else ''}"
        )

    @property
    def _company(self) -> str:
        number = self.options["concurrency"]
        return f", {number} at a time" if number > 1 else ""

    @property
    def _quantised(self) -> str:
        how = self.model.get("quantised")
        if not how:
            return ""
        return (
            f" Lossless means here: equal to this quantised base ({how}), not to the model it was made from."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and complete: verdict, counts, differences, formulas, model, options and provenance."""
        return {
            "kind": "orthrus-audit",
            "format_version": 5,
            "passed": self.passed,
            "summary": self.summary,
            "model": self.model,
            "options": self.options,
            "provenance": self.provenance,
            "legend": LEGEND,
            "strategies": [asdict(s) | {"bound": s.bound} for s in self.strategies],
            "mismatches": [asdict(m) for m in self.mismatches],
            "damages": list(self.damages),
            "faults": list(self.faults),
        } | ({} if self.full is None else {"full": self.full.to_dict()})

    def to_table(self) -> RenderableType:
        """For a terminal: the counts by strategy, the differences, the formulas, and the verdict."""
        parts: list[RenderableType] = [_table(_COUNTS, [_counts(s) for s in self.strategies])]
        if self.mismatches:
            parts.append(_table(_DIFFERENCES, [_difference(m) for m in self.mismatches]))
        shown = LEGEND if self.mismatches else {k: v for k, v in LEGEND.items() if k not in _ONLY_DIFFERENCES}
        parts += [f"[dim]{name}: {formula}[/dim]" for name, formula in shown.items()]
        parts += [escape(s.bound) for s in self.strategies]
        if self.full is not None:
            parts += [_table(*self.full.test_table), _table(*self.full.text_table)]
            parts += [f"[dim]{name}: {escape(formula)}[/dim]" for name, formula in FULL_LEGEND.items()]
        parts += [f"damaged cache: {escape(what)}" for what in self.damages]
        return Group(*parts, escape(self.summary))

    def to_markdown(self) -> str:
        lines = [f"**{self.summary}**", "", markdown_table(_COUNTS, [_counts(s) for s in self.strategies])]
        if self.mismatches:
            lines += ["", markdown_table(_DIFFERENCES, [_difference(m) for m in self.mismatches])]
        lines += ["", *(f"- `{name}`: {formula}" for name, formula in LEGEND.items())]
        lines += [f"- {s.bound}" for s in self.strategies]
        lines += [f"- damaged cache: {what}" for what in self.damages]
        if self.full is not None:
            lines += ["", self.full.to_markdown()]
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """The counts, one line per strategy; differences are in the JSON form."""
        out = io.StringIO()
        writer = csv.DictWriter(out, fieldnames=list(StrategyResult.__slots__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(s) for s in self.strategies)
        return out.getvalue()


_ONLY_DIFFERENCES = ("score", "gap", "rounding_spread", "drift", "residue")
_COUNTS = [
    "strategy",
    "prompts",
    "identical",
    "near_ties",
    "broken",
    "tokens",
    "acceptance_rate",
    "tokens_per_forward",
]
_DIFFERENCES = [
    "strategy",
    "prompt",
    "token",
    "baseline",
    "ours",
    "gap",
    "rounding_spread",
    "drift",
    "residue",
    "verdict",
    "reason",
]


def _counts(s: StrategyResult) -> list[str]:
    counts = (s.num_prompts, s.num_identical, s.num_near_ties, s.num_broken, s.num_tokens)
    rate = "–" if s.acceptance_rate is None else f"{s.acceptance_rate:.1%}"
    return [s.strategy, *map(str, counts), rate, f"{s.tokens_per_forward:.2f}"]


def _difference(m: Mismatch) -> list[str]:
    tokens = [
        "(end)" if token is None else f"{text!r} ({token})"
        for token, text in ((m.baseline_token, m.baseline_text), (m.our_token, m.our_text))
    ]
    numbers = ["–" if x is None else f"{x:.3g}" for x in (m.gap, m.rounding_spread, m.drift, m.residue)]
    return [m.strategy, str(m.prompt_index + 1), str(m.position + 1), *tokens, *numbers, m.verdict, m.reason]


def _table(header: list[str], body: list[list[str]]) -> Table:
    # Names wrap at their underscores, so that the counts fit a terminal of 80 columns.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in header:
        table.add_column(name.replace("_", "\n"))
    for line in body:
        table.add_row(*map(escape, line))
    return table
