"""A folder with a PEFT adapter is a model: its base with the adapter merged in."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.folders import save_base
from tests.tiny import tiny_prompt
from transformers import AutoModelForCausalLM

from orthrus.base.fingerprint import fingerprint
from orthrus.errors import CorruptFileError, OrthrusWarning
from orthrus.hf.auto import OrthrusForCausalLM
from orthrus.model.checkpoint import load_view, save_view
from orthrus.model.loading import load_dual, load_frozen
from orthrus.training.recipe import TrainConfig
from orthrus.training.start import starting_view

IDS_1T = torch.tensor([tiny_prompt(9)])
# PEFT still asks for a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Trained, as far as anyone can tell, on a stock base with PEFT alone."""
    base = save_base(tmp_path / "base")
    stock = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(stock, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path / "adapter"


def test_an_adapter_folder_loads_as_its_base_with_it_merged(adapter: Path) -> None:
    model = OrthrusForCausalLM.from_pretrained(adapter, view="untrained", runner="eager")
    merged = AutoModelForCausalLM.from_pretrained(adapter.parent / "merged")
    options = {"max_new_tokens": 20, "eos_token_id": None}
    ours = model.generate(IDS_1T, **options)
    assert torch.equal(ours, merged.generate(IDS_1T, **options))
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    assert not torch.equal(ours, base.generate(IDS_1T, **options))


def test_a_view_on_an_adapter_names_the_adapter_as_its_base(adapter: Path) -> None:
    base, dual = load_dual(str(adapter), "untrained", device="cpu")
    assert base.reference == str(adapter)
    assert base.name == "adapter"
    assert dual.config.base_name == str(adapter)


@pytest.mark.filterwarnings("ignore:the view was trained on:orthrus.errors.OrthrusWarning")
def test_a_view_that_goes_on_training_on_an_adapter_belongs_to_it(adapter: Path, tmp_path: Path) -> None:
    _, dual = load_dual(str(adapter.parent / "base"), "untrained", device="cpu")
    save_view(dual, tmp_path / "view")
    adapted = load_frozen(str(adapter), device="cpu").base
    weights = fingerprint(adapted.model)
    assert weights != dual.config.base_fingerprint
    again = starting_view(adapted, TrainConfig(init_view=str(tmp_path / "view"), block_size=8))
    assert (again.config.base_name, again.config.base_fingerprint) == (str(adapter), weights)
    save_view(again, tmp_path / "again")
    its_own = load_frozen(str(adapter), device="cpu").base
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_view(its_own, tmp_path / "again")
    with pytest.warns(OrthrusWarning, match="drafts may be worth less"):
        load_view(load_frozen(str(adapter.parent / "base"), device="cpu").base, tmp_path / "again")


def test_whatever_names_a_base_names_it_for_training_too(adapter: Path, tmp_path: Path) -> None:
    base, dual = load_dual(str(adapter.parent / "base"), "untrained", device="cpu")
    save_view(dual, tmp_path / "view")
    found = load_frozen(str(tmp_path / "view"), device="cpu")
    assert found.kind == "view"
    assert found.base.reference == base.reference
    assert fingerprint(found.base.model) == dual.config.base_fingerprint
    assert load_frozen(str(adapter.parent / "base"), device="cpu").kind == "base"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_without_a_base_is_one_sentence(adapter: Path, content: str) -> None:
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"adapter_config\.json"):
        load_dual(str(adapter), "untrained", device="cpu")


def test_an_adapter_that_does_not_fit_is_one_sentence(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(CorruptFileError, match="the adapter adapter does not load onto base"):
        load_dual(str(adapter), "untrained", device="cpu")


def test_an_adapter_with_a_weight_that_is_no_number_is_refused(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    weights[sorted(weights)[0]][0, 0] = math.nan
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match="in adapter holds a number that is not finite"):
        load_dual(str(adapter), "untrained", device="cpu")
