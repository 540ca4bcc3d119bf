"""Repetition penalty and token bias in OrthrusForCausalLM.generate: transformers' own text."""

from typing import Any

import pytest
import torch
from tests.folders import save_base
from tests.tiny import VOCAB, disturb_view, tiny_prompt
from torch import Tensor

from orthrus.config import FIXED_STRATEGIES
from orthrus.hf.auto import OrthrusForCausalLM

IDS_1T = torch.tensor([tiny_prompt(9)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OrthrusForCausalLM:
    folder = save_base(tmp_path_factory.mktemp("base") / "tiny")
    loaded = OrthrusForCausalLM.from_pretrained(folder, view="untrained")
    disturb_view(loaded.dual, 0.1)
    return loaded


def stock(model: OrthrusForCausalLM, *args: Any, **kwargs: Any) -> Tensor:
    base = model.dual.stock()
    return base.generate(*args, **kwargs)


RULES: dict[str, Any] = {
    "penalty": {"repetition_penalty": 1.4},
    "bias": {"sequence_bias": [[[7], -100.0], [[11], 2.5]]},
    "bias by tuples": {"sequence_bias": {(7,): -100.0, (11,): 2.5}},
    "both": {"repetition_penalty": 0.8, "sequence_bias": {(5,): 3.0}},
}


@pytest.mark.parametrize("strategy", FIXED_STRATEGIES)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_penalties_and_biases_are_stocks_own(model: OrthrusForCausalLM, rules: Any, strategy: str) -> None:
    options = {"max_new_tokens": 24, "eos_token_id": None}
    out = model.generate(IDS_1T, strategy=strategy, **options, **rules)
    assert torch.equal(out, stock(model, IDS_1T, **options, **rules))
    assert not torch.equal(out, model.generate(IDS_1T, **options))


def test_a_penalty_in_the_models_own_config_is_honoured(
    model: OrthrusForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_new_tokens": 24, "eos_token_id": None}
    free = model.generate(IDS_1T, **options)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.4)
    out = model.generate(IDS_1T, **options)
    assert torch.equal(out, stock(model, IDS_1T, **options))
    assert not torch.equal(out, free)
    assert torch.equal(model.generate(IDS_1T, repetition_penalty=1.0, **options), free)


def test_a_penalty_works_when_sampling_too(model: OrthrusForCausalLM) -> None:
    """Banned tokens never come, and the same torch seed gives one text under every strategy."""
    texts = []
    for strategy in FIXED_STRATEGIES:
        torch.manual_seed(3)
        out = model.generate(
            IDS_1T,
            max_new_tokens=24,
            eos_token_id=None,
            do_sample=True,
            temperature=2.0,
            strategy=strategy,
            repetition_penalty=1.3,
            sequence_bias={(i,): -100.0 for i in range(0, VOCAB, 2)},
        )
        texts.append(out[0, 9:].tolist())
    assert texts == [texts[0]] * len(FIXED_STRATEGIES)
    assert all(i % 2 for i in texts[0])
