"""A fingerprint names the weights: not their precision, not their sharing, but every change."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from orthrus.base import fingerprint


def tiny(tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(torch.bfloat16).to(torch.float32)


def test_form_and_determinism() -> None:
    name = fingerprint(tiny())
    assert name.startswith("blake2b:")
    assert len(name) == len("blake2b:") + 32
    assert name == fingerprint(tiny())


def test_precision_does_not_matter() -> None:
    assert fingerprint(tiny()) == fingerprint(tiny().to(torch.bfloat16))


def test_one_changed_weight_shows() -> None:
    model = tiny()
    before = fingerprint(model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] += 0.5
    assert fingerprint(model) != before


def test_shape_and_name_matter() -> None:
    weight = torch.ones(4, 6)
    one, other, renamed = nn.Module(), nn.Module(), nn.Module()
    one.a = nn.Parameter(weight)
    other.a = nn.Parameter(weight.reshape(6, 4))
    renamed.b = nn.Parameter(weight)
    assert len({fingerprint(one), fingerprint(other), fingerprint(renamed)}) == 3


def test_buffers_do_not_count_and_tied_tensors_count_once() -> None:
    model = tiny(tied=True)
    before = fingerprint(model)
    model.register_buffer("scratch", torch.ones(3))
    assert fingerprint(model) == before
    assert before != fingerprint(tiny(tied=False))
