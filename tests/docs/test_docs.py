"""The docs cannot drift: their code runs, their commands parse, their links and files exist."""

import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from tests.cli.conftest import byte_tokenizer, write_model
from tests.docs.pages import code_blocks
from tests.server.conftest import byte_orthrus, run, serving

import orthrus
from orthrus.api import Orthrus
from orthrus.cli.app import app
from orthrus.hf.auto import OrthrusForCausalLM
from orthrus.training.recipe import TrainConfig

ROOT = Path(__file__).parents[2]
OUTSIDE = ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")
PAGES = sorted([*(ROOT / f"{name}.md" for name in OUTSIDE), *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def tiny_load(monkeypatch):
    """`Orthrus.load` gives a tiny model, whatever it is asked for."""
    made = byte_orthrus()
    monkeypatch.setattr(Orthrus, "load", classmethod(lambda cls, *a, **k: made))
    return made


class Answering(SimpleNamespace):
    """Stands for OpenAI's client: its questions go to a server in this process. tests/clients has the real one."""

    def __init__(self, base_url: str, api_key: str) -> None:
        super().__init__(chat=SimpleNamespace(completions=SimpleNamespace(create=self.create)))
        assert base_url == "http://127.0.0.1:8000/v1"

    def create(self, *, extra_body: dict[str, Any] | None = None, **fields: Any) -> Any:
        return json.loads(post("/v1/chat/completions", fields | (extra_body or {})), object_hook=Fields)


class Fields(SimpleNamespace):
    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(**given)


def post(path: str, body: dict[str, Any]) -> str:
    """What a server around a tiny model answers; 200, or the test fails."""

    async def ask() -> str:
        async with serving(byte_orthrus(), names=("default",), max_tokens=64) as client:
            response = await client.post(path, json=body)
            assert response.status_code == 200, response.text
            return response.text

    return run(ask)


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """Here `my-model` is a merged folder, as `orthrus convert --to merged` writes it."""
    model = OrthrusForCausalLM.from_pretrained(write_model(tmp_path / "base"), view="untrained")
    model.save_pretrained(tmp_path / "my-model")
    byte_tokenizer().save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)


SNIPPETS = [page for page in PAGES if code_blocks(page, "python")]


@pytest.mark.parametrize("page", SNIPPETS, ids=lambda p: p.stem)
def test_the_python_of_a_page_runs(page, tiny_load, merged, monkeypatch, capsys):
    """All of it, one after the other, as a reader would type it."""
    monkeypatch.setitem(sys.modules, "openai", SimpleNamespace(OpenAI=Answering))
    names: dict[str, object] = {}
    for code in code_blocks(page, "python"):
        exec(compile(code, page.name, "exec"), names)
        said = capsys.readouterr().out
        assert said.strip() or "print(" not in code


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial/serve.md"])
def test_what_curl_asks_is_answered(page):
    lines = re.findall(r"^curl (.*?}')$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert lines
    for line in lines:
        words = shlex.split(line.replace("\\\n", " "))
        (url,) = (word for word in words if word.startswith("http://"))
        body = json.loads(words[words.index("-d") + 1])
        # A small model samples nonsense at the server's temperature of 1.
        assert body["temperature"] == 0
        text = post(url.removeprefix("http://127.0.0.1:8000"), body)
        if body.get("stream"):
            assert "-N" in words
            assert text.startswith("data: ")
            assert text.rstrip().endswith("data: [DONE]")
        else:
            assert json.loads(text)["choices"][0]["message"]["role"] == "assistant"


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
        for line in block.replace("\\\n", " ").splitlines()
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


def anchors(page: Path) -> set[str]:
    """Where links into a page may lead, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"[- ]+", "-", heading) for heading in plain}


def test_links_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            if target.startswith(("http://", "https://")):
                continue
            found = page.parent / target if target else page
            assert found.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(found), f"{page.name} links to {target}#{anchor}"


def test_the_site_has_every_page_once():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page for entry in site["nav"] for part in entry.values() for page in pages_of(part)]
    assert len(set(listed)) == len(listed)
    assert {ROOT / "docs" / page for page in listed} == set((ROOT / "docs").rglob("*.md"))


def pages_of(part: Any) -> list[str]:
    return [part] if isinstance(part, str) else [page for entry in part for page in entry.values()]


def prose(page: Path) -> list[str]:
    """Lines outside of code, tables and headings."""
    text = page.read_text(encoding="utf-8")
    # Code, and what programs write.
    for left_out in (r"^```.*?^```$", r"^<!-- (?:table|begin).*?^<!-- end -->$"):
        text = re.sub(left_out, "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if not line.startswith(("|", "#", "    ", "!", "<"))]


def test_the_readme_is_short_and_lines_of_prose_too():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
    for page in PAGES:
        assert [line for line in prose(page) if len(line) > 120] == [], page.name


def test_each_page_says_first_what_it_is_for():
    for page in PAGES:
        if page.parent == ROOT:
            continue
        first = next(line for line in prose(page) if line.strip())
        assert first.startswith(("This page ", "This tutorial ")), f"{page.name}: {first}"


def test_training_says_what_each_key_does():
    keys = {field.name for field in fields(TrainConfig)}
    told = re.findall(r"^\| (`.+?) \|", (ROOT / "docs/training.md").read_text(), flags=re.MULTILINE)
    assert keys <= {name for cell in told for name in re.findall(r"`(\w+)`", cell)}


def test_the_files_that_architecture_names_exist():
    named = re.findall(
        r"`((?:src|benchmarks|docs)/[\w/.-]+\.\w+)`", (ROOT / "docs/architecture.md").read_text()
    )
    assert len(named) >= 8
    assert [n for n in named if not (ROOT / n).is_file()] == []


def test_public_names_are_documented_in_one_place():
    assert all(hasattr(orthrus, name) for name in orthrus.__all__)
