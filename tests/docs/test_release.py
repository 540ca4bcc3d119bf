"""What a release promises: versions that agree, bounds where private parts are used, extras that bring what is used."""

import ast
import importlib
import platform
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from tests.tiny_orthrus import tiny_orthrus

from orthrus.engine.compiled import compile_problem
from orthrus.engine.runners import make_runner

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# Private parts of other packages that we use, and where: each may go with any release of its package. Whoever adds one
# gives its package an upper bound in pyproject.toml, and says here what breaks without it.
PRIVATE = {
    "torch._inductor.aot_compile": "engine/layer_code.py: compiled layers",
    "torch._inductor.cpp_builder.CppBuilder": "kernels/build.py: our kernels",
    "torch._inductor.cpp_builder.CppTorchOptions": "kernels/build.py: our kernels",
    "torch._inductor.cpu_vec_isa.pick_vec_isa": "kernels/build.py: our kernels",
    "torch._check": "engine/layer_code.py: sizes that compiled layers take as they come",
    "torch.utils._python_dispatch.TorchDispatchMode": "training/speed.py: the operations of a step, counted",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": "base/quantised.py: quantised weights, recognised",
    "transformers.utils.chat_template_utils._compile_jinja_template": "base/template.py: templates, checked",
}
# The same of torch's C++ headers.
PRIVATE_CPP = {
    "torch::aot_inductor::tensor_handle_to_tensor_pointer",
    "torch::aot_inductor::new_tensor_handle",
}
IMPORTED_AS = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub", "prompt-toolkit": "prompt_toolkit"}
IMPORTED_AS |= {"prometheus-client": "prometheus_client", "llama-cpp-python": "llama_cpp"}


def is_private(module: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in module.split("."))


def private_names(source: str) -> set[str]:
    """Full names of private parts of torch, transformers and the hub client that a source uses."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    packages = ("torch.", "transformers.", "huggingface_hub.", "typer.", "gguf.", "safetensors.")
    return {name for name in found if name.startswith(packages) and is_private(name)}


def test_the_private_parts_that_we_use_are_these_and_are_there() -> None:
    used = {name for file in SOURCES for name in private_names(file.read_text(encoding="utf-8"))}
    assert used == set(PRIVATE)
    for name in PRIVATE:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    files = [f.relative_to(ROOT / "src/orthrus").as_posix() for f in SOURCES]
    assert {where.split(":")[0] for where in PRIVATE.values()} <= set(files)


def test_private_names_are_seen() -> None:
    assert private_names("from torch._inductor import config") == {"torch._inductor.config"}
    assert private_names("import torch\ntorch._dynamo.reset()") == {"torch._dynamo.reset", "torch._dynamo"}
    assert private_names("from torch.nn import Linear\ntorch.library.__doc__") == set()


def test_the_private_headers_that_we_use_are_these() -> None:
    kernels = [f for f in (ROOT / "src/orthrus/kernels").iterdir() if f.suffix in (".cpp", ".h")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in kernels)
    assert set(re.findall(r"torch::aot_inductor::\w+", text)) == PRIVATE_CPP


def requirements(lines: list[str]) -> dict[str, str]:
    """Package -> its bounds."""
    return {re.split(r"[<>=~!\[ ]", line)[0]: line for line in lines}


def test_packages_with_private_parts_have_upper_bounds() -> None:
    needed = requirements(PROJECT["dependencies"])
    for name in {private.split(".")[0] for private in PRIVATE} | {"transformers", "huggingface-hub"}:
        assert "<" in needed[name], needed[name]
    # What the tests run with lies within the bounds.
    pinned = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    upper = re.search(r"<(\d+)\.(\d+)", needed["torch"])
    assert pinned
    assert upper
    assert tuple(map(int, pinned.groups())) < tuple(map(int, upper.groups()))


def test_all_that_is_imported_is_asked_for() -> None:
    """By the package or one of its extras; what is optional beside them is refused with the line that installs it."""
    extras = {k: v for k, v in PROJECT["optional-dependencies"].items() if k != "dev"}
    asked = requirements([*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)])
    modules = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in asked} | {"orthrus"}
    # Brought along by transformers; by fastapi.
    along = {"tokenizers", "jinja2", "yaml", "tqdm", "packaging"} | {"starlette", "anyio"}
    # Installed by whoever wants them: docs/quantised.md, docs/training.md.
    optional = {"bitsandbytes", "peft", "trackio", "wandb", "vllm"}
    imported: dict[str, str] = {}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported |= {str(name).split(".")[0]: file.name for name in names}
    unknown = set(imported) - modules - along - optional - set(sys.stdlib_module_names)
    assert {name: imported[name] for name in unknown} == {}


def test_the_version_is_the_same_everywhere_and_has_its_changes() -> None:
    version = PROJECT["version"]
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cff["version"] == version
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", version]


def test_what_a_release_ships_is_there() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    for name in config["targets"]["sdist"]["include"]:
        assert (ROOT / name.lstrip("/")).exists(), name
    for source in config["targets"]["wheel"]["force-include"]:
        assert (ROOT / source / "view.safetensors").is_file()


@pytest.mark.parametrize(
    "file", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda f: f.stem
)
def test_issue_forms_are_forms(file: Path) -> None:
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    if file.stem == "config":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(form)
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0


@pytest.mark.parametrize(
    ("system", "machine"),
    [("darwin", "arm64"), ("darwin", "x86_64"), ("linux", "aarch64"), ("win32", "AMD64")],
)
@pytest.mark.filterwarnings("error")
def test_platforms_that_nobody_has_tried_run_eagerly_by_default(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    monkeypatch.delenv("ORTHRUS_RUNNER", raising=False)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    dual = tiny_orthrus().dual
    assert "x86-64 Linux" in str(compile_problem(dual))
    # Without a warning: it is what they are meant to get.
    assert make_runner(dual, "auto").name == "eager"


def test_scripts_import_names_that_are_there() -> None:
    """A benchmark that nobody has run since is not to break unseen."""
    for script in sorted([*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("examples/*.py")]):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orthrus"):
                module = importlib.import_module(str(node.module))
                missing = [each.name for each in node.names if not hasattr(module, each.name)]
                assert missing == [], f"{script}: {node.module}"
