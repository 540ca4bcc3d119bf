"""The docs cannot drift: their code runs, their commands parse, their links and files exist."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import typer
from tests.tiny_orthrus import TinyTokenizer, tiny_orthrus

import orthrus
from orthrus.api import Orthrus
from orthrus.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


class ChatTokenizer(TinyTokenizer):
    """With a template, for the pages that chat."""

    chat_template = "one after the other"
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def get_chat_template(self):
        return "{% for m in messages %}{{ m.content }}{% endfor %}"

    def __call__(self, text, **_):
        return super().__call__(text)


@pytest.fixture
def tiny_load(monkeypatch):
    """`Orthrus.load` gives a tiny model, whatever it is asked for."""
    made = tiny_orthrus()
    made.base = replace(made.base, tokenizer=ChatTokenizer())
    monkeypatch.setattr(Orthrus, "load", classmethod(lambda cls, *a, **k: made))
    return made


def test_readme_python_runs(tiny_load, capsys):
    first = code_blocks(ROOT / "README.md", "python")[0]
    exec(compile(first, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_strategies_page_keeps_its_promise(tiny_load):
    """Its code asserts that all strategies give one text."""
    (code,) = code_blocks(ROOT / "docs/strategies.md", "python")
    names: dict[str, object] = {}
    exec(compile(code, "strategies.md", "exec"), names)
    assert all(names["texts"].values())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_examples_run(example, tiny_load, capsys):
    exec(compile(example.read_text(encoding="utf-8"), str(example), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def commands_in_docs() -> list[tuple[str, str]]:
    lines = [
        (page.name, line)
        for page in PAGES
        for block in code_blocks(page, "bash")
        for line in block.splitlines()
    ]
    return [(name, line.strip()) for name, line in lines if line.strip().startswith("orthrus ")]


def test_documented_commands_parse():
    root = typer.main.get_command(app)
    found = commands_in_docs()
    assert len(found) >= 4
    for page, line in found:
        words = shlex.split(line, comments=True)[1:]
        name = max((n for n in root.commands if words[: len(n.split())] == n.split()), key=len)
        command, words = root.commands[name], words[len(name.split()) :]
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        unknown = [w for w in words if w.startswith("-") and w != "-" and w.split("=")[0] not in options]
        assert not unknown, f"{page}: {line}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_files_that_architecture_names_exist():
    named = re.findall(
        r"`((?:src|benchmarks|docs)/[\w/.-]+\.\w+)`", (ROOT / "docs/architecture.md").read_text()
    )
    assert len(named) >= 8
    assert [n for n in named if not (ROOT / n).is_file()] == []


def test_public_names_are_documented_in_one_place():
    assert all(hasattr(orthrus, name) for name in orthrus.__all__)
