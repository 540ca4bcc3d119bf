"""benchmarks/long_context.py on a tiny model: what it measures, and that the parts are of one cycle."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.tiny_orthrus import tiny_orthrus

from orthrus.model.pool import PAGE

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "long_context.py"
SPEC = importlib.util.spec_from_file_location("long_context_script", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
script: Any = importlib.util.module_from_spec(SPEC)
# Dataclasses look their module up by name.
sys.modules[SPEC.name] = script
SPEC.loader.exec_module(script)


def run(output: Path, *args: str) -> None:
    command = typer.main.get_command(script.app)
    command.main([*args, "--warmup", "1", "--output", str(output)], standalone_mode=False)


def test_every_strategy_at_every_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.Orthrus, "load", lambda *_: tiny_orthrus())
    output = tmp_path / "new" / "long.json"
    run(output, "--context", "90", "--context", "12", "--repeats", "3")
    report = json.loads(output.read_text())
    assert {"legend", "provenance", "model", "options", "results"} <= report.keys()
    rows = {(row["strategy"], row["context"]): row for row in report["results"]}
    assert list(rows) == [(s, n) for n in (12, 90) for s in ("ar", "chain", "fused_tree")]
    for (strategy, context), row in rows.items():
        assert (row["num_passes"], row["num_rows"]) == {
            "ar": (1, 1),
            "chain": (2, 1 + 8 + 1 + 6),
            "fused_tree": (1, 1 + 24 + 3 * 8),
        }[strategy]
        assert row["history_bytes"] == context * 2 * 2 * 2 * 8 * 4
        # Whole pages for the text and the rows of the cycle's largest pass.
        assert row["kv_bytes"] % (PAGE * 2 * 2 * 2 * 8 * 4) == 0
        assert row["kv_bytes"] > row["history_bytes"] + row["num_rows"] // row["num_passes"]
        assert row["cycle_ms"]["low"] > 0
        assert min(row[f"{part}_ms"] for part in ("layers", "head", "upkeep", "rest")) > 0
        if context == 12:
            assert row["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize(
    ("args", "message"),
    [(("--context", "240"), "240 leaves no room"), (("--strategy", "auto"), "name fixed strategies")],
)
def test_what_cannot_be_measured_is_refused(
    args: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.Orthrus, "load", lambda *_: tiny_orthrus())
    with pytest.raises(typer.BadParameter, match=message):
        run(tmp_path / "long.json", *args)
    assert not (tmp_path / "long.json").exists()
