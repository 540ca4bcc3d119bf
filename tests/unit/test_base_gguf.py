"""GGUF files: a real tiny one round trip, and one sentence for each way to be broken."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from tests.gguf_files import write_gguf

from orthrus.base import fingerprint, load_base
from orthrus.base.gguf import inspect
from orthrus.errors import CorruptFileError, StorageError, UnsupportedModelError


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


def test_round_trip_keeps_weights_tokenizer_and_template(
    gguf_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = load_base(str(gguf_file), device="cpu")
    assert base.source.kind == "gguf"
    assert base.name == "tiny.gguf"
    assert base.eos_token_ids == {2}
    assert base.context_length == 128
    assert base.model.dtype == torch.float32
    assert base.tokenizer.model_max_length == 128
    assert base.tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert base.tokenizer.decode(base.encode_prompt("hey")) == "<s>hey"
    # Value for value what the reference code of the format gives.
    rng = np.random.default_rng(0)
    embedding = base.model.get_input_embeddings().weight
    raw = quantize(rng.normal(0, 0.1, embedding.shape).astype(np.float32), Kind.Q8_0)
    assert torch.equal(embedding, torch.from_numpy(dequantize(raw, Kind.Q8_0)))
    out = base.model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= 5
    assert capfd.readouterr() == ("", "")


def test_second_load_unpacks_nothing(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_base(str(gguf_file), device="cpu")

    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("unpacked twice")

    monkeypatch.setattr("orthrus.base.gguf.convert", never)
    stages: list[str] = []
    second = load_base(
        str(gguf_file), device="cpu", on_progress=lambda stage, _done, _total: stages.append(stage)
    )
    assert fingerprint(first.model) == fingerprint(second.model)
    assert any("checking" in stage for stage in stages)
    manifest = json.loads(next((gguf_file.parent / "cache" / "models").glob("*/manifest.json")).read_text())
    assert manifest["source"]["file"] == "tiny.gguf"


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.F16, torch.float16),
        (Kind.BF16, torch.bfloat16),
        (Kind.F32, torch.float32),
        (Kind.Q4_1, torch.float32),
    ],
)
def test_dtype_that_loses_nothing(tmp_path: Path, kind: Kind, dtype: torch.dtype) -> None:
    write_gguf(tmp_path / "x.gguf", kind=kind)
    facts = inspect(tmp_path / "x.gguf")
    assert facts.dtype == dtype
    assert facts.splitting == "smollm"


def test_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(np.random.default_rng(0).bytes(4096))
    with pytest.raises(CorruptFileError, match="not a GGUF file"):
        load_base(str(path), device="cpu")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_truncated_anywhere(gguf_file: Path, share: float) -> None:
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[: max(4, int(len(content) * share))])
    with pytest.raises(CorruptFileError, match="truncated or damaged") as caught:
        load_base(str(gguf_file), device="cpu")
    assert "\n" not in str(caught.value)
    models = gguf_file.parent / "cache" / "models"
    assert not models.exists() or all(path.suffix == ".lock" for path in models.iterdir())


def test_noise_behind_the_magic(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + np.random.default_rng(1).bytes(4096))
    with pytest.raises(CorruptFileError):
        load_base(str(path), device="cpu")


def test_a_cache_folder_that_cannot_be_is_one_sentence(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    for place in ("/proc/orthrus", str(tmp_path / "link"), str(tmp_path / "file")):
        monkeypatch.setenv("ORTHRUS_CACHE", place)
        with pytest.raises(StorageError, match=r"cannot be made .*point ORTHRUS_CACHE at a folder of yours"):
            load_base(str(gguf_file), device="cpu")


def test_unknown_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "x.gguf"
    write_gguf(path, arch="nosuchnet")
    with pytest.raises(UnsupportedModelError, match="nosuchnet"):
        load_base(str(path), device="cpu")


def test_a_missing_tensor_is_not_replaced_by_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "x.gguf"
    write_gguf(path, skip="blk.1.ffn_up.weight")
    with pytest.raises(CorruptFileError, match=r"lacks 1 tensors, model\.layers\.1\.mlp\.up_proj"):
        load_base(str(path), device="cpu")
