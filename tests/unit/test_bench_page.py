"""The page of results: what it holds, that it asks nothing of the network, and the README's tables."""

import importlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.tiny_orthrus import tiny_orthrus

from orthrus.base.bench_prompts import BenchPrompt
from orthrus.bench import BenchOptions, run_bench
from orthrus.bench.page import make_page
from orthrus.bench.svg import Axis, Bar, Bars, Lines, Series
from orthrus.errors import UserInputError

ROOT = Path(__file__).parents[2]
VOID = {"meta", "line", "rect", "circle", "polyline", "polygon", "path"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("results")
    options = BenchOptions(
        prompts=[BenchPrompt("first", "math"), BenchPrompt("<script>", "a&b")],
        strategies=("chain:floor=false", "chain", "chain:block_size=4", "tree"),
        max_new_tokens=16,
        repeats=1,
    )
    raws: dict[str, Any] = {
        "bench": run_bench(tiny_orthrus(), options).to_dict(),
        "curve": {
            "kind": "orthrus-training-curve",
            "points": [{"arm": "kl", "targets": t, "tokens_per_cycle": 2 + t / 1e5} for t in (1e4, 4e4)],
        },
        "sceptic": {
            "kind": "orthrus-sceptic",
            "results": {
                "gsm8k": {
                    arm: {"tokens_per_pass": tokens, "accuracy": 0.4, "interval": [0.3, 0.5]}
                    for arm, tokens in (("base", 1.0), ("orthrus", 2.0), ("unverified", 5.0))
                }
            },
        },
    }
    made = []
    for name, raw in raws.items():
        made.append(folder / f"{name}.json")
        made[-1].write_text(json.dumps(raw))
    results = ROOT / "benchmarks" / "results"
    return [*made, results / "long-context-avx512-cpu.json", results / "audit-cpu.json"]


class Balanced(HTMLParser):
    """Every tag is closed in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_every_plot_of_the_issue_is_there(files: list[Path]) -> None:
    page = make_page(files)
    keys = [plot.key for plot in page.plots]
    assert keys == [
        "waterfall-greedy",
        "positions-greedy",
        "break-even-greedy",
        "block-length-greedy",
        "training",
        "accuracy-gsm8k",
        "context",
    ]
    for plot in page.plots:
        root = ElementTree.fromstring(plot.svg())
        assert root.get("aria-label") == plot.title
        assert plot.caption
        assert plot.svg() in page.html
    assert "240 of 240" in page.html or "broken rules" in page.html


def test_the_page_is_whole_and_alone(files: list[Path]) -> None:
    html = make_page([files[0], files[0]]).html
    balanced = Balanced()
    balanced.feed(html)
    assert balanced.open == []
    # Two files of one kind keep their plots apart.
    ids = re.findall(r'<figure id="([^"]+)"', html)
    assert len(ids) == len(set(ids)) == 8
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!#)(?:https?:)?//", html)
    assert "@import" not in html
    assert "<script" not in html
    assert "a&amp;b" in html
    assert "not available" in html


def test_series_differ_without_colour() -> None:
    series = [Series(str(n), [(0.0, float(n)), (1.0, float(n))]) for n in range(8)]
    svg = Lines(Axis("x"), Axis("y"), series).svg("eight")
    grey = re.sub(r"#[0-9A-Fa-f]{3,6}", "#000", svg)
    dashes = re.findall(r'<polyline [^>]*stroke-dasharray="([^"]*)"', grey)
    assert len(set(dashes)) == 8
    bars = Bars(Axis("y"), [Bar(str(n), 1.0 + n, 0.9 + n, 1.1 + n) for n in range(7)]).svg("seven")
    assert len(set(re.findall(r"url\(#hatch\d\)", bars))) == 7


def test_what_has_no_plots_is_told(tmp_path: Path) -> None:
    other = tmp_path / "x.json"
    other.write_text('{"kind": "orthrus-receipt"}')
    with pytest.raises(UserInputError, match=r"x\.json is of no kind"):
        make_page([other])
    other.write_text('{"kind": "orthrus-training-curve"}')
    with pytest.raises(UserInputError, match=r"x\.json is damaged"):
        make_page([other])
    with pytest.raises(UserInputError, match="cannot read"):
        make_page([tmp_path / "none.json"])


def test_tables_of_pages_are_those_of_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("readme_tables")
    found = []
    for page in tables.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        found += re.findall(r"<!-- table: (\w+) -->", text)
        assert tables.with_tables(text) == text, "run: python benchmarks/readme_tables.py"
        # A figure that was typed does not last.
        changed = re.sub(r"(<!-- table: .*?)\b1\.(\d\d) \|", r"\g<1>9.\2 |", text, count=1, flags=re.DOTALL)
        assert changed != text
        assert tables.with_tables(changed) == text
    assert sorted(found) == sorted(tables.TABLES)
