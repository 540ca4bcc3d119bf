"""Where the code of compiled layers is kept: what its name depends on, and what happens to damaged files."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.tiny import tiny_dual

from orthrus.base.families import decoder_layers
from orthrus.engine import layer_code
from orthrus.engine.fast_layers import fast_layer
from orthrus.engine.layer_code import Arguments
from orthrus.kernels.build import load_kernels
from orthrus.model.dual_view import DualView
from orthrus.model.runner import EagerRunner


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    """Layers are packed for them."""
    load_kernels()


def digest(dual: DualView, *, given_dtype: torch.dtype = torch.float32, mixed: bool = False) -> str:
    layer = fast_layer(next(iter(decoder_layers(dual.base))))
    given = {"position_embeddings": (torch.ones(1, 3, 8, dtype=given_dtype),) * 2}
    keys = EagerRunner(dual).new_pool(1).keys[0]
    plan_P = torch.zeros(9, dtype=torch.long)
    marker = torch.empty(2, 0) if mixed else None
    hidden_1TC = torch.zeros(1, 3, 32, dtype=dual.dtype)
    example = Arguments(hidden_1TC, given, torch.arange(3), keys, keys, plan_P, marker)
    return layer_code._digest(layer, example, dual.base.config)


def test_the_name_of_the_code_tells_apart_what_compiles_to_other_code() -> None:
    names = [
        digest(tiny_dual("llama")),
        digest(tiny_dual("llama"), given_dtype=torch.bfloat16),
        digest(tiny_dual("llama"), mixed=True),
        digest(tiny_dual("llama").to(torch.bfloat16)),
        digest(tiny_dual("llama", layers=(1,))),
        digest(tiny_dual("qwen2")),
    ]
    assert len(set(names)) == len(names)
    assert digest(tiny_dual("llama", seed=5)) == names[0]


@pytest.mark.parametrize("content", [b"", b"bad"])
def test_damaged_code_is_made_anew(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path) -> bytes:
        return path.read_bytes()

    def compile_to(*_: object, options: dict[str, str]) -> str:
        made = options["aot_inductor.output_path"]
        Path(made).write_bytes(b"good")
        return made

    program = SimpleNamespace(module=lambda: None, example_inputs=((), {}))
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path))
    monkeypatch.setattr(layer_code, "_digest", lambda *_: "name")
    monkeypatch.setattr(layer_code, "_exported", lambda *_: program)
    monkeypatch.setattr(layer_code, "_loaded", load)
    monkeypatch.setattr(torch._inductor, "aot_compile", compile_to)
    nothing = SimpleNamespace()
    for _ in range(2):
        assert layer_code.layer_code(nothing, nothing, config=None) == b"good"  # type: ignore[arg-type]
        (tmp_path / "compiled" / "layers-name.so").write_bytes(content)


def test_compiling_leaves_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads compile too, and find their files where they left them."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "theirs"))
    seen = []

    def compile_to(*_: object, options: dict[str, str]) -> str:
        seen.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        Path(options["aot_inductor.output_path"]).write_bytes(b"good")
        return options["aot_inductor.output_path"]

    program = SimpleNamespace(module=lambda: None, example_inputs=((), {}))
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path))
    monkeypatch.setattr(layer_code, "_digest", lambda *_: "name")
    monkeypatch.setattr(layer_code, "_exported", lambda *_: program)
    monkeypatch.setattr(layer_code, "_loaded", Path.read_bytes)
    monkeypatch.setattr(torch._inductor, "aot_compile", compile_to)
    nothing = SimpleNamespace()
    layer_code.layer_code(nothing, nothing, config=None)  # type: ignore[arg-type]
    assert seen == [str(tmp_path / "theirs")]


def test_the_linears_can_be_imported_without_onednn() -> None:
    program = """
import types, torch
torch.ops.mkldnn = torch.ops.onednn = types.SimpleNamespace()
import orthrus.model.int8_linear
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
