"""A folder with a PEFT adapter is a model: its base with the adapter merged in."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.folders import save_base
from tests.tiny import tiny_prompt
from transformers import AutoModelForCausalLM

from orthrus.errors import CorruptFileError
from orthrus.hf.auto import OrthrusForCausalLM
from orthrus.model.loading import load_dual

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
    model = OrthrusForCausalLM.from_pretrained(adapter, view="fresh", runner="eager")
    merged = AutoModelForCausalLM.from_pretrained(adapter.parent / "merged")
    options = {"max_new_tokens": 20, "eos_token_id": None}
    ours = model.generate(IDS_1T, **options)
    assert torch.equal(ours, merged.generate(IDS_1T, **options))
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    assert not torch.equal(ours, base.generate(IDS_1T, **options))


def test_a_view_on_an_adapter_names_the_adapter_as_its_base(adapter: Path) -> None:
    base, dual = load_dual(str(adapter), "fresh", device="cpu")
    assert base.reference == str(adapter)
    assert base.name == "adapter"
    assert dual.config.base_name == str(adapter)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_without_a_base_is_one_sentence(adapter: Path, content: str) -> None:
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"adapter_config\.json"):
        load_dual(str(adapter), "fresh", device="cpu")


def test_an_adapter_that_does_not_fit_is_one_sentence(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(CorruptFileError, match="the adapter adapter does not load onto base"):
        load_dual(str(adapter), "fresh", device="cpu")


def test_an_adapter_with_a_weight_that_is_no_number_is_refused(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    weights[sorted(weights)[0]][0, 0] = math.nan
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match="in adapter holds a number that is not finite"):
        load_dual(str(adapter), "fresh", device="cpu")
