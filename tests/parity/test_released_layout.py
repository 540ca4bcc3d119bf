"""The layout of the released Orthrus-Qwen3 checkpoints, read and written; and the traps of their own code.

The folder is written here by hand, name by name, so that our own table of names cannot excuse itself.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.folders import letter_tokenizer, save_base
from tests.tiny import FAMILY_CONFIGS, VOCAB, tiny_model, tiny_prompt
from torch import Tensor

from orthrus import Orthrus, OrthrusForCausalLM
from orthrus.base.fingerprint import fingerprint
from orthrus.errors import CheckpointError, CorruptFileError
from orthrus.model.dual_view import DualView
from orthrus.model.merged import save_merged
from orthrus.model.view_config import ViewConfig

PROMPT = tiny_prompt(30, seed=1)
TWINNED = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


def released_tensors(seed: int = 0) -> dict[str, Tensor]:
    """A tiny Qwen3 in the released names; the diffusion tensors lie near their AR twins."""
    tensors = {name: t.clone() for name, t in tiny_model("qwen3", seed).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for layer in range(2):
        for module in TWINNED:
            ar = tensors[f"model.layers.{layer}.self_attn.{module}.weight"]
            noise = 0.05 * torch.randn(ar.shape, generator=generator) * (ar.std() if ar.ndim > 1 else 1.0)
            tensors[f"model.layers.{layer}.self_attn.{module}_diff.weight"] = ar + noise
    return tensors


def released_config(**changes: Any) -> dict[str, Any]:
    config = FAMILY_CONFIGS["qwen3"].to_dict() | {
        "architectures": ["OrthrusLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_orthrus.OrthrusLM"},
        "block_size": 8,
        "mask_token_id": VOCAB - 1,
        "dtype": "float32",
    }
    return {key: value for key, value in (config | changes).items() if value is not ...}


def write_released(folder: Path, *, num_shards: int = 1, tensors: Any = None, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(released_config(**changes)))
    # The released generation config says that there is no KV cache; nothing here may depend on that.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "use_cache": False}))
    letter_tokenizer().save_pretrained(folder)
    tensors = released_tensors() if tensors is None else tensors
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = sorted(tensors), {}
    for i in range(num_shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({n: tensors[n] for n in names[i::num_shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::num_shards], file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("num_shards", [1, 3])
def test_loads_without_remote_code_and_every_tensor_is_where_it_belongs(
    num_shards: int, tmp_path: Path
) -> None:
    orthrus = Orthrus.load(str(write_released(tmp_path / "released", num_shards=num_shards)), device="cpu")
    tensors = released_tensors()
    config = orthrus.dual.config
    assert (config.block_size, config.mask_token_id, config.trained) == (8, VOCAB - 1, True)
    for layer in range(2):
        attention = orthrus.dual.base.model.layers[layer].self_attn
        for module in TWINNED:
            twin, name = getattr(attention, module), f"model.layers.{layer}.self_attn.{module}"
            assert torch.equal(twin.ar.weight, tensors[f"{name}.weight"])
            assert torch.equal(twin.diffusion.weight, tensors[f"{name}_diff.weight"])
    stock = orthrus.stock()
    assert type(stock).__name__ == "Qwen3ForCausalLM"
    assert config.base_fingerprint == fingerprint(stock)


@pytest.mark.parametrize("floor", [True, False])
def test_its_drafts_hit_and_its_text_is_the_stock_models(floor: bool, tmp_path: Path) -> None:
    orthrus = Orthrus.load(str(write_released(tmp_path / "released")), device="cpu")
    config = {"max_new_tokens": 40, "ignore_eos": True, "raw": True}
    prompt = letter_tokenizer().decode(PROMPT)
    result = orthrus.generate(prompt, floor=floor, **config)
    ids_1T = torch.tensor([orthrus.base.encode_prompt(prompt, raw=True)])
    stock = orthrus.stock()
    expected_1T = stock.generate(ids_1T, max_new_tokens=40, eos_token_id=None, use_cache=True)
    assert list(result.token_ids) == expected_1T[0, ids_1T.shape[1] :].tolist()
    assert len(set(result.token_ids)) > 2
    assert 0 < result.stats.num_accepted < result.stats.num_drafted


@pytest.mark.parametrize("num_shards", [1, 2])
def test_export_gives_back_every_tensor_under_its_name_bit_for_bit(num_shards: int, tmp_path: Path) -> None:
    source = write_released(tmp_path / "released", num_shards=num_shards)
    model = OrthrusForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "again", layout="released")

    before, after = read_all(source), read_all(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert {*index["weight_map"].values()} == {f.name for f in (tmp_path / "again").glob("*.safetensors")}
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["OrthrusLM"], "qwen3")
    assert (config["block_size"], config["mask_token_id"]) == (8, VOCAB - 1)

    reloaded = OrthrusForCausalLM.from_pretrained(tmp_path / "again")
    first, second = model.dual.state_dict(), reloaded.dual.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first.keys() == second.keys()


def test_a_released_view_can_be_stored_as_a_view_folder_of_its_base(tmp_path: Path) -> None:
    source = write_released(tmp_path / "released")
    model = OrthrusForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "view", layout="view")
    again = OrthrusForCausalLM.from_pretrained(tmp_path / "view")
    first, second = model.dual.state_dict(), again.dual.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def exported(dual: DualView, folder: Path) -> None:
    save_merged(dual, None, folder, "released")


def view_on(name: str, **config: Any) -> DualView:
    from orthrus.base.families import find_family

    model = tiny_model(name)
    return DualView(model, find_family(model), ViewConfig(**{"block_size": 8, "mask_token_id": 60, **config}))


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("llama", {}, "for Qwen3 only, and this is Llama"),
        ("qwen3-moe", {}, "for Qwen3 only, and this is Qwen3-MoE"),
        ("qwen3", {"mask_token_id": None}, "no place for a trained mask embedding"),
        ("qwen3", {"layers": (1,)}, "twins in every layer"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_and_leaves_nothing(
    name: str, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"released layout cannot hold this view: .*{reason}"):
        exported(view_on(name, **config), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["block_size", "mask_token_id"])
def test_a_config_without_its_extra_fields_is_refused(missing: str, tmp_path: Path) -> None:
    folder = write_released(tmp_path / "released", **{missing: ...})
    with pytest.raises(CheckpointError, match=rf"config\.json lacks {missing}") as caught:
        Orthrus.load(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_missing_diffusion_tensors_are_named(tmp_path: Path) -> None:
    tensors = {n: t for n, t in released_tensors().items() if "k_norm_diff" not in n}
    folder = write_released(tmp_path / "released", tensors=tensors)
    with pytest.raises(
        CheckpointError, match=r"lacks 2 tensors, model.layers.0.self_attn.k_norm_diff.weight first"
    ):
        Orthrus.load(str(folder), device="cpu")


def test_missing_base_tensors_are_named(tmp_path: Path) -> None:
    tensors = {n: t for n, t in released_tensors().items() if n != "model.layers.1.mlp.up_proj.weight"}
    folder = write_released(tmp_path / "released", tensors=tensors)
    with pytest.raises(CorruptFileError, match=r"lack 1 tensors, model.layers.1.mlp.up_proj.weight first"):
        Orthrus.load(str(folder), device="cpu")


def test_a_mask_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write_released(tmp_path / "released", mask_token_id=VOCAB)
    with pytest.raises(CheckpointError, match=f"mask token id {VOCAB}"):
        Orthrus.load(str(folder), device="cpu")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_released(tmp_path / "released", num_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CorruptFileError, match=r"model-00002-of-00003\.safetensors"):
        Orthrus.load(str(folder), device="cpu")


def test_trap_sliding_window_layers(tmp_path: Path) -> None:
    """The official code fails an assertion on them."""
    changes = {
        "use_sliding_window": True,
        "sliding_window": 12,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    orthrus = Orthrus.load(str(write_released(tmp_path / "released", **changes)), device="cpu")
    prompt = letter_tokenizer().decode(PROMPT)
    ar, chain = (
        orthrus.generate(prompt, raw=True, strategy=strategy, max_new_tokens=40, ignore_eos=True)
        for strategy in ("ar", "chain")
    )
    assert ar.token_ids == chain.token_ids
    assert chain.stats.num_accepted > 0


def test_trap_a_batch_a_padding_mask_and_a_list_of_eos(tmp_path: Path) -> None:
    """The official code fails on a batch and on a list, and drops the mask."""
    model = OrthrusForCausalLM.from_pretrained(write_released(tmp_path / "released"))
    ids_BT = torch.tensor([[0] * 20 + tiny_prompt(10), tiny_prompt(30, seed=1)])
    mask_BT = (ids_BT != 0).long()
    options = {"attention_mask": mask_BT, "max_new_tokens": 20, "eos_token_id": [1, 2]}
    stock = model.dual.stock()
    expected = stock.generate(ids_BT, use_cache=True, **options)
    assert torch.equal(model.generate(ids_BT, **options), expected)


def test_trap_no_logits_for_every_row_of_the_prompt(tmp_path: Path) -> None:
    """The official code projects all of them: 12 GB at full context."""
    model = OrthrusForCausalLM.from_pretrained(write_released(tmp_path / "released"), runner="eager")
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, args, _out: rows.append(args[0].shape[-2]))
    model.generate(torch.tensor([PROMPT]), max_new_tokens=1, strategy="chain")
    assert rows == [1]


def test_trap_do_sample_and_temperature_reach_both_strategies(tmp_path: Path) -> None:
    """The official AR mode never samples, and its diffusion mode always does."""
    model = OrthrusForCausalLM.from_pretrained(write_released(tmp_path / "released"))
    ids_1T = torch.tensor([PROMPT])
    for strategy in ("ar", "chain"):
        options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "strategy": strategy}
        greedy = {
            tuple(model.generate(ids_1T, do_sample=False, temperature=5.0, **options)[0].tolist())
            for _ in "ab"
        }
        drawn = {
            tuple(model.generate(ids_1T, do_sample=True, temperature=5.0, **options)[0].tolist())
            for _ in "ab"
        }
        assert (len(greedy), len(drawn)) == (1, 2)


def test_a_stock_qwen3_is_no_released_checkpoint(tmp_path: Path) -> None:
    orthrus = Orthrus.load(str(save_base(tmp_path / "base", "qwen3")), "untrained", device="cpu")
    assert not orthrus.dual.config.trained
