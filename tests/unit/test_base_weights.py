"""Weights that are no numbers, and configs that describe another model: refused by name, before memory is."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.folders import load_disturbed, save_base

from orthrus.base.loading import load_base
from orthrus.base.weights import is_finite, weight_files
from orthrus.errors import CorruptFileError, OrthrusError, UnsupportedModelError, UserInputError
from orthrus.model.checkpoint import save_view
from orthrus.model.loading import load_dual
from orthrus.model.merged import save_merged


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name, value in fields.items():
        config.pop(name, None) if value is ... else config.update({name: value})
    file.write_text(json.dumps(config))


def change_weight(file: Path, value: float) -> str:
    weights = load_file(file)
    name = sorted(weights)[-1]
    weights[name].view(-1)[-1] = value
    save_file(weights, file, metadata={"format": "pt"})
    return name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_base_with_a_weight_that_is_no_number_is_refused(folder: Path, value: float) -> None:
    name = change_weight(folder / "model.safetensors", value)
    with pytest.raises(CorruptFileError, match=rf"{name} in .*model\.safetensors holds a number that is not"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", ["view", "merged"])
def test_a_view_with_a_weight_that_is_no_number_is_refused(tmp_path: Path, value: float, layout: str) -> None:
    base, dual = load_disturbed(save_base(tmp_path / "base"))
    if layout == "view":
        save_view(dual, tmp_path / "out")
    else:
        save_merged(dual, base, tmp_path / "out")
    name = change_weight(tmp_path / "out" / "view.safetensors", value)
    with pytest.raises(CorruptFileError, match=rf"{name} in .*view\.safetensors holds a number that is not"):
        load_dual(str(tmp_path / "out"), device="cpu")


# The fingerprint is of another precision.
@pytest.mark.filterwarnings("ignore:the view was trained on")
def test_a_weight_that_overflows_in_float16_is_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    save_view(load_disturbed(folder)[1], tmp_path / "view")
    name = change_weight(tmp_path / "view" / "view.safetensors", 1e5)
    load_dual(str(folder), str(tmp_path / "view"), device="cpu")
    with pytest.raises(UserInputError, match=rf"{name} .* overflows in float16: load it in float32"):
        load_dual(str(folder), str(tmp_path / "view"), dtype="float16", device="cpu")
    name = change_weight(folder / "model.safetensors", 1e5)
    load_base(str(folder), device="cpu")
    with pytest.raises(UserInputError, match=rf"{name} of base overflows in float16"):
        load_base(str(folder), dtype="float16", device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.ones(3, 2).to(dtype))
    assert is_finite(torch.empty(0, dtype=dtype))
    assert not is_finite(torch.tensor([1.0, math.nan, 2.0]).to(dtype))


def test_a_config_with_fewer_layers_than_the_weights_is_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(CorruptFileError, match=r"hold more layers: 2, and config\.json says 1"):
        load_base(str(folder), device="cpu")


def test_a_tensor_that_is_missing_is_not_replaced_by_noise(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CorruptFileError, match=r"lack 1 tensors, model\.layers\.1\.mlp\.up_proj\.weight first"
    ):
        load_base(str(folder), device="cpu")


def test_tensors_that_the_config_has_no_place_for_are_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "llama-tied")
    change_config(folder, attention_bias=False)
    with pytest.raises(CorruptFileError, match=r"no place for 8 tensors .*k_proj\.bias first"):
        load_base(str(folder), device="cpu")


HUGE = 10**12


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 0}, {"num_hidden_layers": -1}, {"num_hidden_layers": HUGE}, {"vocab_size": 0},
        {"vocab_size": HUGE}, {"hidden_size": HUGE}, {"intermediate_size": HUGE}, {"num_attention_heads": HUGE},
        {"num_key_value_heads": HUGE}, {"head_dim": HUGE}, {"num_attention_heads": 0}, {"hidden_size": "32"},
        {"hidden_size": None}, {"hidden_size": 1.5}, {"num_hidden_layers": [2]}, {"rope_parameters": 5},
        {"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, {"max_position_embeddings": "x"},
        {"max_position_embeddings": 0}, {"model_type": 5}, {"model_type": None}, {"architectures": 5},
        {"vocab_size": 40}, {"hidden_act": "no such act"}, {"quantization_config": 5}, {"dtype": "float31"},
        {"quantization_config": {"quant_method": "none"}}, {"eos_token_id": "two"}, {"rms_norm_eps": "x"},
        {"tie_word_embeddings": "x"}, {"pad_token_id": HUGE}, {"layer_types": ["x"]}, {"auto_map": 5},
        {"text_config": 5}, {"num_key_value_heads": 3}, {"head_dim": 7}, {"torch_dtype": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_wrong_values_is_one_sentence(folder: Path, fields: dict[str, Any]) -> None:
    change_config(folder, **fields)
    message = ""
    try:
        base = load_base(str(folder), device="cpu")
    except OrthrusError as error:
        message = str(error)
    else:
        # Some values are ignored by transformers: then it is the model as it was.
        assert base.context_length > 0
        assert not {"num_hidden_layers", "hidden_size", "vocab_size"} & fields.keys()
    assert "\n" not in message
    assert message.count(". ") == 0


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_code_from_a_hub_is_refused(folder: Path, key: str) -> None:
    change_config(folder, **{key: "kernels-community/flash-attn"})
    with pytest.raises(UnsupportedModelError, match=f"{key} = 'kernels-community/flash-attn'"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("content", [b"", b"\x00", b"{}", b"\xff" * 8 + b"{}", (2**62).to_bytes(8, "little")])
def test_weight_files_that_are_none_are_one_sentence(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors cannot be read"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "../x"}}']
)
def test_an_index_that_is_none_is_one_sentence(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(CorruptFileError, match="index"):
        load_base(str(folder), device="cpu")


def test_the_file_that_is_checked_is_the_file_that_is_loaded(folder: Path) -> None:
    """transformers prefers a single file to an index, so an index that stayed behind counts for nothing."""
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    assert weight_files(folder) == [folder / "model.safetensors"]
    assert load_base(str(folder), device="cpu").context_length > 0
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="lacks 1 of 1 weight files"):
        load_base(str(folder), device="cpu")


def test_weights_in_a_pickle_are_refused(folder: Path) -> None:
    """Their sizes cannot be read without loading them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(CorruptFileError, match=r"no weights in safetensors files: fetch model\.safetensors"):
        load_base(str(folder), device="cpu")
