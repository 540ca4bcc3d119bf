"""vLLM's engines in processes of their own, and what our engine said beforehand. `make test-vllm` runs this.

In the environment, PYTHON_OF_ORTHRUS names an interpreter that has Orthrus with the default model; the one
that runs the tests has vLLM and Orthrus. VLLM_TEST_FOLDER keeps what was prepared from run to run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("PYTHON_OF_ORTHRUS", str(ROOT / ".venv" / "bin" / "python"))
QUIET = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "OMP_WAIT_POLICY": "passive"}
OURS = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
Run = Callable[..., dict[str, Any]]


def prepared(module: str, result: str, kept: str | None, made: Path) -> Path:
    """The folder that `kept` names, else the new one, with what `module` writes; `result`: its last file."""
    folder = Path(kept) if kept else made
    if not (folder / result).is_file():
        command = [PYTHON, "-m", module, str(folder)]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | QUIET | OURS, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model, exported, and an oracle; VLLM_TEST_FOLDER keeps them from run to run."""
    kept = os.environ.get("VLLM_TEST_FOLDER")
    return prepared("tests.vllm.prepare", "oracle.json", kept, tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="session")
def oracle(folder: Path) -> dict[str, Any]:
    """Prompts and what our engine's `chain` made of them."""
    found: dict[str, Any] = json.loads((folder / "oracle.json").read_text())
    return found


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Start an engine, run rounds of prompts through it, end it."""

    def run_engine(model: Path, rounds: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        place = tmp_path_factory.mktemp("engine")
        plan, out = place / "plan.json", place / "out.json"
        plan.write_text(json.dumps({"model": str(model), "options": options, "rounds": rounds}))
        command = [sys.executable, str(Path(__file__).with_name("engine_run.py")), str(plan), str(out)]
        done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run_engine


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of each family, exported; VLLM_FAMILIES_FOLDER keeps them from run to run."""
    kept = os.environ.get("VLLM_FAMILIES_FOLDER")
    made = tmp_path_factory.mktemp("families")
    return prepared("tests.vllm.prepare_families", "families.json", kept, made)
