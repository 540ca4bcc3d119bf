"""benchmarks/acceptance.py on a tiny model: what it counts, and how it goes on."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.tiny_orthrus import tiny_orthrus

from orthrus.model.figures import read_figures

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "acceptance.py"
SPEC = importlib.util.spec_from_file_location("acceptance_script", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
script: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    made[0].write_text('{"prompt": "first"}\n{"prompt": "and second"}\n')
    made[1].write_text('{"prompt": "third"}\n{"prompt": "left out"}\n{"prompt": "also"}\n')
    monkeypatch.setattr(script.Orthrus, "load", lambda *_: tiny_orthrus())
    return made


def run(files: list[Path], output: Path, strategy: list[str], **options: Any) -> dict[str, Any]:
    args = [*map(str, files), "--limit", "2", "--max-new-tokens", "12", "--output", str(output)]
    for name, values in ({"strategy": strategy} | {key: [value] for key, value in options.items()}).items():
        args += [part for value in values for part in (f"--{name.replace('_', '-')}", str(value))]
    typer.main.get_command(script.app).main(args, standalone_mode=False)
    report: dict[str, Any] = json.loads(output.read_text())
    return report


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_follow_from_the_counts_of_each_prompt(
    files: list[Path], tmp_path: Path, temperature: float
) -> None:
    report = run(
        files, tmp_path / "r.json", ["ar", "chain", "fused_tree"], temperature=temperature, node_budget=6
    )

    assert [(name, *rows) for name, rows in report["results"].items()] == [
        (name, "one", "two") for name in ("ar", "chain", "fused_tree")
    ]
    plain, tree = (report["results"][name]["one"] for name in ("ar", "fused_tree"))
    assert (plain["tokens_per_cycle"], plain["tokens_per_forward"], plain["rows_per_pass"]) == (1.0, 1.0, 1.0)
    assert "acceptance_rate" not in plain
    counts = report["runs"]["fused_tree"]["one"]
    assert len(counts["tokens"]) == 2
    assert tree["tokens_per_cycle_pooled"] == (sum(counts["tokens"]) - 2) / sum(counts["cycles"])
    assert tree["tokens_per_forward"] == sum(counts["tokens"]) / sum(counts["passes"]) > 1.0
    assert tree["rows_per_pass"] == sum(counts["rows"]) / (sum(counts["passes"]) - 2) > 6.0
    assert tree["acceptance_rate"] == sum(counts["accepted"]) / sum(counts["drafted"])
    assert all(row["num_equal_to_ar"] == 2 for rows in report["results"].values() for row in rows.values())
    assert counts["output"][0] != counts["output"][1]
    assert [(row["set"], row["strategy"]) for row in read_figures(tmp_path / "r.json")][:3] == [
        ("one", "ar"), ("two", "ar"), ("one", "chain")
    ]  # fmt: skip


def test_it_goes_on_where_it_stopped(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, measured = tmp_path / "r.json", []
    measure = script.measure

    def watched(orthrus: Any, title: str, *rest: Any) -> Any:
        measured.append(title)
        if len(measured) == 2:
            raise OSError("stopped")
        return measure(orthrus, title, *rest)

    monkeypatch.setattr(script, "measure", watched)
    with pytest.raises(OSError, match="stopped"):
        run(files, output, ["chain"])
    first = json.loads(output.read_text())
    report = run(files, output, ["chain"])
    assert measured == ["chain, one", "chain, two", "chain, two"]
    assert report["runs"]["chain"]["one"] == first["runs"]["chain"]["one"]
    assert "num_equal_to_ar" not in report["results"]["chain"]["one"]

    # What comes later is compared with what was there, and the other way round.
    report = run(files, output, ["ar", "chain"])
    assert measured[3:] == ["ar, one", "ar, two"]
    assert report["results"]["chain"]["two"]["num_equal_to_ar"] == 2


def test_it_does_not_mix(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    run(files, output, ["ar"])
    before = output.read_text()
    with pytest.raises(typer.BadParameter, match="another model"):
        run(files, output, ["ar"], block_budget=1)
    files[0].write_text('{"prompt": "first"}\n{"prompt": "and changed"}\n')
    with pytest.raises(typer.BadParameter, match="prompts"):
        run(files, output, ["chain"])
    with pytest.raises(typer.BadParameter, match="same name"):
        run([files[0], files[0]], output, ["ar"])
    assert output.read_text() == before


def test_an_answer_that_differs_is_not_counted_as_equal() -> None:
    names = ("tokens", "cycles", "passes", "prefill_passes", "rows", "drafted", "accepted")
    counts = {name: [2, 2] for name in names}
    runs = {name: {"one": counts | {"output": ["same", name]}} for name in ("ar", "chain")}
    assert script.results(runs)["chain"]["one"]["num_equal_to_ar"] == 1


def test_lists_of_counts_take_one_line() -> None:
    content = {"a": [1, 2], "b": {"c": ["x y", "z"]}, "d": [{"e": [3]}], "f": []}
    text = script.compact_json(content)
    assert json.loads(text) == content
    assert '"a": [1, 2]' in text
