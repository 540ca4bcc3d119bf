"""The thousand prompts: enough, all different, in twelve domains, the same every time; and their audit resumes."""

import json
from pathlib import Path

import pytest
from tests.tiny_orthrus import tiny_orthrus
from typer.testing import CliRunner

from orthrus.base.bench_prompts import load_prompts


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_a_thousand_prompts_in_twelve_domains(scripts: None, tmp_path: Path) -> None:
    from many_prompts import DOMAINS, main, records

    main(tmp_path / "many.jsonl")
    prompts = load_prompts(tmp_path / "many.jsonl")
    assert len(prompts) >= 1000
    assert len({json.dumps(prompt.prompt) for prompt in prompts}) == len(prompts)
    assert {prompt.domain for prompt in prompts} == set(DOMAINS)
    assert len(DOMAINS) == 12
    assert list(records(2)) == list(records())[:24]
    assert not any("{" in json.dumps(p.prompt).replace('{"role"', "") for p in prompts)


def test_the_long_audit_goes_on_where_it_was_stopped(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import thousand_prompts
    import typer

    loads = []

    def load(*names: str) -> object:
        loads.append(names)
        return tiny_orthrus()

    monkeypatch.setattr(thousand_prompts.Orthrus, "load", load)
    monkeypatch.setattr(
        thousand_prompts, "records", lambda n: [{"domain": "chat", "prompt": f"p {i}"} for i in range(4 * n)]
    )
    app = typer.Typer()
    app.command()(thousand_prompts.main)
    out = tmp_path / "out.json"
    arguments = [str(out), "--per-domain", "1", "--dtype", "float32", "--chunk", "2", "--max-new-tokens", "6",
                 "--strategy", "chain"]  # fmt: skip
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    whole = json.loads(out.read_text())
    assert whole["results"]["float32"]["num_identical"] == 4
    assert "0 of 4 outputs differ" in run.output

    shortened = whole | {"chunks": {"float32": whole["chunks"]["float32"][:1]}}
    out.write_text(json.dumps(shortened))
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert json.loads(out.read_text())["results"] == whole["results"]
    assert len(loads) == 2
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert len(loads) == 2
    assert CliRunner().invoke(app, [*arguments, "--concurrency", "3"]).exit_code == 2
