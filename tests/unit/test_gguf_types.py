"""Every common tensor type of GGUF files: weights value for value as the gguf package unpacks them."""

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from tests.gguf_files import write_gguf
from tests.tiny import disturb_view
from tests.ways import WAYS

from orthrus import Orthrus
from orthrus.config import DecodeConfig
from orthrus.errors import UnsupportedModelError

READ = [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q8_0, Kind.Q4_K, Kind.Q6_K, Kind.IQ4_XS]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.name)
def test_a_file_of_that_type_decodes_as_its_unpacked_model(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / "tiny.gguf"
    packed = write_gguf(path, kind=kind, hidden=256)
    orthrus = Orthrus.load(str(path), "untrained", device="cpu")
    gate = orthrus.base.model.get_submodule("model.layers.1.mlp.gate_proj").weight
    assert torch.equal(gate, torch.from_numpy(dequantize(packed["blk.1.ffn_gate.weight"], kind)))
    plain = kind in (Kind.F16, Kind.BF16)
    assert orthrus.describe().get("quantised") == (None if plain else f"GGUF {kind.name}, unpacked")

    disturb_view(orthrus.dual, 0.02)
    prompt = list(range(5, 20))
    model = orthrus.stock()
    out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    for strategy, floor in WAYS:
        config = DecodeConfig(max_new_tokens=12, strategy=strategy, floor=floor, ignore_eos=True)
        assert list(orthrus.stream_ids(prompt, config).drain().token_ids) == out[0, 15:].tolist()


def test_a_type_that_nobody_unpacks_is_named_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, kind=Kind.Q8_K, hidden=256)
    with pytest.raises(
        UnsupportedModelError, match="stores weights as Q8_K, which transformers cannot"
    ) as caught:
        Orthrus.load(str(path), "untrained", device="cpu")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_an_earlier_release_says_what_it_knows(tmp_path: Path) -> None:
    from orthrus.base.gguf import unpacked_types

    (tmp_path / "manifest.json").write_text('{"source": {"file": "a.gguf", "sha256": "0"}}')
    assert unpacked_types(tmp_path) == "GGUF, unpacked"
