"""A live OrthrusForCausalLM that changes: the text is that of the model as it is, whichever runner it began with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.folders import save_base
from tests.tiny import disturb_view, tiny_dual, tiny_prompt
from torch import Tensor, nn

from orthrus.config import DecodeConfig
from orthrus.errors import UserInputError
from orthrus.hf.auto import OrthrusForCausalLM
from orthrus.model.checkpoint import save_view

# More than a page, so that a second request finds kept pages of the first.
IDS_1T = torch.tensor([tiny_prompt(130)])
BOTH_RUNNERS = pytest.mark.parametrize("runner", ["eager", "auto"])


def load(folder: Path, runner: str) -> OrthrusForCausalLM:
    model = OrthrusForCausalLM.from_pretrained(save_base(folder / "tiny"), view="untrained", runner=runner)
    disturb_view(model.dual, 0.1)
    return model


def answer(model: nn.Module) -> Tensor:
    return model.generate(input_ids=IDS_1T, max_new_tokens=20, eos_token_id=None)  # type: ignore[operator, no-any-return]


def randomise(model: nn.Module, name: str, scale: float) -> None:
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if name in path:
                parameter.normal_(0.0, scale, generator=torch.Generator().manual_seed(len(path)))


@BOTH_RUNNERS
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "up_proj"]])
def test_a_lora_reaches_the_ar_side_of_the_twins(tmp_path: Path, runner: str, targets: list[str]) -> None:
    model = load(tmp_path, runner)
    before = answer(model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    randomise(model, "lora_B", 0.5)
    assert all(".ar." in n or "up_proj" in n for n, _ in model.named_parameters() if "lora_B" in n)
    ours = answer(adapted)
    assert torch.equal(ours, answer(model.dual.stock()))
    assert not torch.equal(ours, before)
    with adapted.disable_adapter():
        assert torch.equal(answer(adapted), before)
    assert torch.equal(answer(adapted), ours)
    assert torch.equal(answer(adapted.merge_and_unload()), ours)


@BOTH_RUNNERS
def test_a_lora_beside_twins_of_some_projections(tmp_path: Path, runner: str) -> None:
    """PEFT puts its layer into the attention module itself, of which the eager runner has a copy."""
    dual = tiny_dual("llama", twins=("q_proj", "k_proj", "v_proj"))
    save_view(dual, tmp_path / "view")
    folder = save_base(tmp_path / "tiny")
    model = OrthrusForCausalLM.from_pretrained(folder, view=str(tmp_path / "view"), runner=runner)
    before = answer(model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"]))
    randomise(model, "lora_B", 0.5)
    ours = answer(adapted)
    assert torch.equal(ours, answer(model.dual.stock()))
    assert not torch.equal(ours, before)


@BOTH_RUNNERS
def test_training_steps_show_at_once(tmp_path: Path, runner: str) -> None:
    model = load(tmp_path, runner)
    before = answer(model)
    engine = model.engine
    assert torch.equal(answer(model), before)
    assert model.engine is engine
    weights = [p for n, p in model.dual.base.named_parameters() if "up_proj" in n]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    ours = answer(model)
    assert torch.equal(ours, answer(model.dual.stock()))
    assert not torch.equal(ours, before)


def _as_bfloat16(model: OrthrusForCausalLM) -> None:
    model.to(torch.bfloat16)


def _as_float64(model: OrthrusForCausalLM) -> None:
    model.double()


@BOTH_RUNNERS
@pytest.mark.parametrize("change", [_as_bfloat16, _as_float64])
@pytest.mark.parametrize("used", [False, True])
def test_another_dtype(
    tmp_path: Path, runner: str, change: Callable[[OrthrusForCausalLM], None], used: bool
) -> None:
    """Before the first answer, or after it."""
    model = load(tmp_path, runner)
    if used:
        answer(model)
    change(model)
    plain = model.generate(input_ids=IDS_1T, max_new_tokens=20, eos_token_id=None, strategy="ar")
    if runner == "eager" and model.dtype == torch.float64:
        assert torch.equal(answer(model), answer(model.dual.stock()))
    assert plain.shape == (1, 150)


def test_compiled_passes_of_another_dtype_are_refused(tmp_path: Path) -> None:
    """Below transformers' interface, where nobody looks for changes, nothing is read as what it is not."""
    model = load(tmp_path, "auto")
    if model.engine.runner.name != "compiled":
        pytest.skip("no compiled runner here")
    model.to(torch.bfloat16)
    engine = model.engine
    config = DecodeConfig(strategy="ar", max_new_tokens=4)
    request = engine.submit([5, 6, 7], config, eos_token_ids=frozenset())
    with pytest.raises(UserInputError, match="moved to bfloat16 on cpu"):
        engine.step()
    assert request.closed
