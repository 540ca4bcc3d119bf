"""The transformers interface as other programs meet it: Auto classes, import orders, saving, public names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.folders import save_base
from tests.tiny import VOCAB, disturb_view, tiny_prompt
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import orthrus
from orthrus.errors import CheckpointError, UserInputError
from orthrus.hf.auto import OrthrusConfig, OrthrusForCausalLM

IDS_1T = torch.tensor([tiny_prompt(9)])
IMPORT_ORDERS = {
    "ours last": "from transformers import AutoModelForCausalLM\nimport orthrus",
    "one of ours first": "from orthrus import Orthrus\nfrom transformers import AutoModelForCausalLM",
    "training first": "import orthrus.training.trainer\nfrom transformers import AutoModelForCausalLM",
    "generation before ours": (
        "import transformers.generation.utils\nimport orthrus\nfrom transformers import AutoModelForCausalLM"
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same disturbed view as a merged folder and as a view folder beside its base."""
    root = tmp_path_factory.mktemp("folders")
    model = OrthrusForCausalLM.from_pretrained(save_base(root / "base"), view="untrained")
    disturb_view(model.dual, 0.1)
    model.save_pretrained(root / "merged")
    model.save_pretrained(root / "view", layout="view")
    return {name: root / name for name in ("base", "merged", "view")}


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("imports", IMPORT_ORDERS.values(), ids=IMPORT_ORDERS)
def test_auto_classes_know_our_folders_whatever_is_imported_first(
    folders: dict[str, Path], imports: str
) -> None:
    expected = OrthrusForCausalLM.from_pretrained(folders["merged"]).generate(IDS_1T, max_new_tokens=20)
    out = run_python(
        f"{imports}\nimport sys, torch\n"
        f"ids = torch.tensor({IDS_1T.tolist()})\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "    out = model.generate(ids, max_new_tokens=20, return_dict_in_generate=True)\n"
        "    print(type(model).__name__, out.sequences.tolist(), out.stats[0].num_accepted > 0)\n",
        str(folders["merged"]),
        str(folders["view"]),
    )
    assert out.splitlines() == [f"OrthrusForCausalLM {expected.tolist()} True"] * 2


def test_importing_orthrus_imports_no_torch() -> None:
    heavy = "{m for m in ('torch', 'transformers', 'numpy', 'tokenizers') if m in sys.modules}"
    assert (
        run_python(f"import sys, orthrus\nprint({heavy})\northrus.Cycle; print({heavy})") == "set()\nset()\n"
    )


def test_all_is_what_can_be_imported() -> None:
    assert sorted(orthrus.__all__) == orthrus.__all__
    assert dir(orthrus) == orthrus.__all__
    for name in orthrus.__all__:
        assert getattr(orthrus, name) is not None
    assert set(orthrus._HOME) == {*orthrus.__all__} - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'Orthros'"):
        _ = orthrus.Orthros


def state(model: OrthrusForCausalLM) -> dict[str, torch.Tensor]:
    return model.dual.state_dict()


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gemma3", "phi3", "olmo2", "qwen3-moe"])
def test_saving_and_loading_is_bit_equal(name: str, tmp_path: Path) -> None:
    model = OrthrusForCausalLM.from_pretrained(save_base(tmp_path / "base", name), view="untrained")
    disturb_view(model.dual, 0.15)
    model.save_pretrained(tmp_path / "merged")
    again = OrthrusForCausalLM.from_pretrained(tmp_path / "merged")
    before, after = state(model), state(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.dual.config == model.dual.config
    assert again.base.config.to_diff_dict() == model.base.config.to_diff_dict()
    # Not auto: what it drafts hangs on the times of passes, which each start measures a little more of.
    options: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": None, "return_dict_in_generate": True}
    options["strategy"] = "tree"
    ours, theirs = again.generate(IDS_1T, **options), model.generate(IDS_1T, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.stats[0].num_accepted == theirs.stats[0].num_accepted


def test_the_config_of_a_merged_folder_holds_the_bases_own(folders: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(folders["merged"])
    assert isinstance(config, OrthrusConfig)
    assert config.base_config["model_type"] == "llama"
    assert config.vocab_size == VOCAB
    assert AutoTokenizer.from_pretrained(folders["merged"])("abc")["input_ids"] == [3, 4, 5]


def test_a_stock_base_loads_with_a_untrained_view(folders: dict[str, Path]) -> None:
    with pytest.warns(orthrus.errors.OrthrusWarning, match="no trained view"):
        model = OrthrusForCausalLM.from_pretrained(folders["base"])
    assert not model.dual.config.trained


def test_a_model_made_from_a_config_saves_and_loads(tmp_path: Path) -> None:
    base_config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(OrthrusConfig(base_config))
    assert isinstance(model, OrthrusForCausalLM)
    assert model.generate(IDS_1T % 40, max_new_tokens=5, eos_token_id=None).shape == (1, 14)
    model.save_pretrained(tmp_path / "view", layout="view")
    model.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "view.safetensors").is_file()


def test_an_empty_folder_may_be_written_and_a_full_one_not(folders: dict[str, Path], tmp_path: Path) -> None:
    model = OrthrusForCausalLM.from_pretrained(folders["merged"])
    (tmp_path / "hub").mkdir()
    model.save_pretrained(tmp_path / "hub", layout="view")
    with pytest.raises(UserInputError, match="exists already"):
        model.save_pretrained(tmp_path / "hub", layout="view")
    with pytest.raises(UserInputError, match="layout must be"):
        model.save_pretrained(tmp_path / "other", layout="gguf")


def test_loading_options(folders: dict[str, Path]) -> None:
    model = OrthrusForCausalLM.from_pretrained(
        folders["merged"], torch_dtype="bfloat16", device_map={"": "cpu"}, attn_implementation="eager"
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.base.config._attn_implementation == "eager"
    assert model.generate(IDS_1T, max_new_tokens=4, eos_token_id=None).shape == (1, 13)
    with pytest.raises(UserInputError, match="does not take load_in_8bit"):
        OrthrusForCausalLM.from_pretrained(folders["merged"], load_in_8bit=True)
    with pytest.raises(UserInputError, match="one device"):
        OrthrusForCausalLM.from_pretrained(folders["merged"], device_map={"a": 0, "b": 1})


@pytest.mark.parametrize(
    ("device_map", "device"), [(None, "cpu"), ("auto", None), (1, "cuda:1"), ("cpu", "cpu")]
)
def test_device_map_none_is_the_cpu_and_auto_the_first_accelerator(
    device_map: Any, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(*_: Any, **options: Any) -> Any:
        asked.append(options["device"])
        raise CheckpointError("far enough")

    monkeypatch.setattr("orthrus.model.loading.load_dual", load)
    with pytest.raises(CheckpointError, match="far enough"):
        OrthrusForCausalLM.from_pretrained("x", device_map=device_map)
    assert asked == [device]


def test_the_config_stands_for_the_bases(folders: dict[str, Path]) -> None:
    model = OrthrusForCausalLM.from_pretrained(folders["merged"])
    for name, value in model.base.config.to_dict().items():
        if name not in ("model_type", "architectures", "transformers_version", "dtype"):
            assert getattr(model.config, name) == value
    assert model.config.get_text_config() is model.base.config
    model.config.use_cache = False
    assert model.base.config.use_cache is False
    assert AutoConfig.for_model(**model.config.to_dict()).eos_token_id == model.config.eos_token_id
    with pytest.raises(AttributeError, match="no attribute 'eos'"):
        _ = model.config.eos


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_resizing_the_embeddings_is_the_bases_own(name: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", name)
    model = OrthrusForCausalLM.from_pretrained(folder, view="untrained", runner="eager")
    model.resize_token_embeddings(VOCAB + 3)
    sizes = [len(model.get_input_embeddings().weight), len(model.get_output_embeddings().weight)]
    assert [*sizes, model.config.vocab_size] == [VOCAB + 3] * 3
    assert model.generate(IDS_1T, max_new_tokens=4, eos_token_id=None).shape == (1, 13)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    with pytest.raises(UserInputError, match="mask token"):
        model.resize_token_embeddings(VOCAB - 1)
    assert len(model.get_input_embeddings().weight) == VOCAB + 3


def test_options_at_their_off_value_are_not_given(folders: dict[str, Path]) -> None:
    off: dict[str, Any] = {
        "quantization_config": None,
        "variant": None,
        "subfolder": "",
        "load_in_4bit": False,
    }
    OrthrusForCausalLM.from_pretrained(folders["merged"], max_memory={}, **off)
    with pytest.raises(UserInputError, match="does not take variant"):
        OrthrusForCausalLM.from_pretrained(folders["merged"], variant="fp16")
    with pytest.raises(UserInputError, match="by name"):
        OrthrusForCausalLM.from_pretrained(folders["merged"], "untrained")


def test_saving_takes_its_options_or_refuses_them(folders: dict[str, Path], tmp_path: Path) -> None:
    model = OrthrusForCausalLM.from_pretrained(folders["merged"])
    model.save_pretrained(tmp_path / "split", max_shard_size="20KB", push_to_hub=False, state_dict=None)
    assert len([*(tmp_path / "split").glob("model-*.safetensors")]) > 1
    again = OrthrusForCausalLM.from_pretrained(tmp_path / "split")
    assert all(torch.equal(a, b) for a, b in zip(state(model).values(), state(again).values(), strict=True))
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    for options, message in (
        ({"layuot": "released"}, "does not take layuot"),
        ({"state_dict": {"a": 1}}, "does not take state_dict"),
        ({"safe_serialization": False}, "does not take safe_serialization"),
        ({"push_to_hub": True}, "call push_to_hub"),
    ):
        with pytest.raises(UserInputError, match=message):
            model.save_pretrained(tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_the_runner_is_an_argument_and_the_environments(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert OrthrusForCausalLM.from_pretrained(folders["merged"], runner="eager").engine.runner.name == "eager"
    monkeypatch.setenv("ORTHRUS_RUNNER", "steam")
    with pytest.raises(UserInputError, match="not 'steam'"):
        OrthrusForCausalLM.from_pretrained(folders["merged"])


def test_a_view_folder_as_model_takes_no_second_view(folders: dict[str, Path]) -> None:
    with pytest.raises(UserInputError, match="is a view already"):
        OrthrusForCausalLM.from_pretrained(folders["view"], view="untrained")


def test_a_folder_that_holds_views_says_which(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("view", "best"):
        shutil.copytree(folders["view"], tmp_path / name)
    with pytest.raises(CheckpointError, match="name the folder in it that has one: best or view"):
        OrthrusForCausalLM.from_pretrained(folders["base"], view=str(tmp_path))


def test_a_base_is_no_view(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"no view_config\.json"):
        OrthrusForCausalLM.from_pretrained(folders["base"], view=str(folders["base"]))
