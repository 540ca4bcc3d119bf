"""A rehearsal of docs/reproduce.md: the paper's suite on a tiny checkpoint in the released layout."""

import json
import re
import shlex
from pathlib import Path

import pytest

from orthrus.bench.suites import PAPER_CYCLE, PAPER_SETS, SUITES

from .conftest import Cli, assert_refused

PAGE = Path(__file__).parents[2] / "docs" / "reproduce.md"
TINY = ("--limit", "1", "--max-new-tokens", "8", "--warmup", "0")


@pytest.fixture(scope="module")
def released(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3 with an untrained view, as `orthrus convert --to released` writes it."""
    from transformers import Qwen3Config

    from orthrus.cli.app import main

    from .conftest import write_model

    folder = tmp_path_factory.mktemp("released")
    base = write_model(folder / "base", config_class=Qwen3Config)
    with pytest.raises(SystemExit) as leaving:
        main(["convert", str(base), str(folder / "released"), "--to", "released", "--block-size", "4"])
    assert not leaving.value.code
    return str(folder / "released")


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    folder = tmp_path / "sets"
    folder.mkdir()
    for name in PAPER_SETS:
        lines = [json.dumps({"prompt": f"{name} {n}", "domain": "x"}) for n in range(2)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("orthrus bench ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_pages_commands_run(cli: Cli, released: str, sets: Path, tmp_path: Path) -> None:
    assert json.loads((Path(released) / "config.json").read_text())["architectures"] == ["OrthrusLM"]
    files = {
        "sets": str(sets),
        "paper.json": str(tmp_path / "paper.json"),
        "paper.html": str(tmp_path / "p.html"),
    }
    files |= {"first.json": str(tmp_path / "first.json"), "chiennv/Orthrus-Qwen3-1.7B": released}
    files |= {"bfloat16": "float32"}
    for words in commands():
        known = [files.get(word, word) for word in words]
        is_run = words[:2] != ["bench", "report"]
        more = [*(() if "--data" in words else ("--data", str(sets))), *TINY] if is_run else []
        done = cli(*known, *more)
        assert done.code == 0, done.err
    report = json.loads((tmp_path / "paper.json").read_text())
    assert {row["domain"] for row in report["rows"]} == {"all", *PAPER_SETS}
    assert report["options"]["arms"] == ["stock", "ar", PAPER_CYCLE, "chain", "auto"]
    assert report["options"]["thinking"] is False
    rows = [row for row in report["rows"] if row["temperature"] == 0.0]
    assert all(row["equal_to_plain"] == [row["prompts"]] * 2 for row in rows)
    # The paper's cycle: two passes each, and the prefill's.
    for run in report["runs"]:
        if run["arm"] == PAPER_CYCLE:
            assert run["num_passes"] <= 2 * run["num_cycles"] + run["num_prefill_passes"]
    page = (tmp_path / "p.html").read_text()
    assert "waterfall" in page
    assert not re.search(r'(src|href)="http', page)


def test_a_set_without_a_file_is_told(cli: Cli, released: str, tmp_path: Path) -> None:
    refused = cli("bench", released, "--suite", "paper", "--prompts", "lcb_v5", "--data", str(tmp_path))
    assert_refused(refused, "lcb_v5.jsonl", "--data")
    assert_refused(cli("bench", released, "--prompts", "nothing"), "nothing", "gsm8k")
    assert_refused(cli("bench", released, "--prompts", "x" * 300), "there is no data set", "gsm8k")


def test_the_page_names_the_suites_numbers() -> None:
    text, paper = PAGE.read_text(encoding="utf-8"), SUITES["paper"]
    assert f"`{PAPER_CYCLE}`" in text
    assert f"at most {paper.limit} per set" in text
    assert f"at most {paper.max_new_tokens:,} tokens" in text
