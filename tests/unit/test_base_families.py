"""Every row of the family table against a real, tiny model of that family."""

from typing import Any

import pytest
import torch
import transformers as tr
from torch import nn

from orthrus.base import FAMILIES, attention_modules, check_layers, context_length, find_family, layer_windows
from orthrus.base.families import decoder_layers
from orthrus.errors import UnsupportedModelError

_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_WINDOW = {"use_sliding_window": True, "sliding_window": 6}

CONFIGS: dict[str, tr.PreTrainedConfig] = {
    "llama": tr.LlamaConfig(**_SIZES),
    "qwen2": tr.Qwen2Config(**_SIZES),
    "qwen2-window": tr.Qwen2Config(**_SIZES, **_WINDOW, max_window_layers=2),
    "qwen3": tr.Qwen3Config(**_SIZES),
    "qwen3-window": tr.Qwen3Config(**_SIZES, **_WINDOW, max_window_layers=1),
    "qwen3-moe": tr.Qwen3MoeConfig(**_SIZES, **_EXPERTS),
    "qwen3-moe-window": tr.Qwen3MoeConfig(**_SIZES, **_EXPERTS, **_WINDOW),
    "mistral": tr.MistralConfig(**_SIZES, sliding_window=6),
    "mistral-full": tr.MistralConfig(**_SIZES, sliding_window=None),
    "gemma2": tr.Gemma2Config(**_SIZES, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": tr.Gemma3TextConfig(**_SIZES, sliding_window=6, sliding_window_pattern=2),
    "phi3": tr.Phi3Config(**{k: v for k, v in _SIZES.items() if k != "head_dim"}, sliding_window=6),
    "olmo2": tr.Olmo2Config(**_SIZES),
    "smollm3": tr.SmolLM3Config(**_SIZES, no_rope_layers=[1, 1, 1, 0]),
    "smollm3-window": tr.SmolLM3Config(**_SIZES, **_WINDOW, no_rope_layers=[1, 0, 1, 0]),
}
WINDOWS: dict[str, list[int | None]] = {
    "qwen2-window": [None, None, 6, 6],
    "qwen3-window": [None, 6, 6, 6],
    "qwen3-moe-window": [6, 6, 6, 6],
    "mistral": [6, 6, 6, 6],
    "gemma2": [6, None, 6, None],
    "gemma3": [6, None, 6, None],
    "phi3": [6, 6, 6, 6],
    "smollm3-window": [None, 6, None, 6],
}


def build(config: tr.PreTrainedConfig) -> tr.PreTrainedModel:
    torch.manual_seed(0)
    return tr.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(params=list(CONFIGS))
def named_model(request: pytest.FixtureRequest) -> tuple[str, tr.PreTrainedModel]:
    return request.param, build(CONFIGS[request.param])


def test_every_family_is_tried() -> None:
    tried = {config.model_type for config in CONFIGS.values()}
    assert tried == {model_type for family in FAMILIES for model_type in family.model_types}


def test_twin_names_are_all_of_the_attention(named_model: tuple[str, tr.PreTrainedModel]) -> None:
    _, model = named_model
    family = find_family(model)
    check_layers(model, family)
    attention = attention_modules(model)
    assert [module.layer_idx for module in attention] == list(range(4))
    for module in attention:
        with_weights = {
            name for name, child in module.named_children() if next(child.parameters(), None) is not None
        }
        assert with_weights == set(family.twin_names)


def test_mlp_names_are_all_of_the_mlp_but_for_experts(named_model: tuple[str, tr.PreTrainedModel]) -> None:
    name, model = named_model
    family = find_family(model)
    for layer in decoder_layers(model):
        found = {
            path for path, child in layer.get_submodule("mlp").named_children() if type(child) is nn.Linear
        }
        assert family.mlp_names == () if name.startswith("qwen3-moe") else found == set(family.mlp_names)


def test_row_dimension_counts_the_tokens(named_model: tuple[str, tr.PreTrainedModel]) -> None:
    _, model = named_model
    family, num_rows, seen = find_family(model), 5, []
    for module in attention_modules(model):
        for name in family.twin_names:

            def record(_m: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                seen.append((name, args[0].shape[family.row_dim(name)]))

            module.get_submodule(name).register_forward_pre_hook(record)
    model(torch.arange(3, 3 + num_rows)[None])
    assert len(seen) == 4 * len(family.twin_names)
    assert {rows for _, rows in seen} == {num_rows}


def test_windows_are_those_of_the_stock_code(named_model: tuple[str, tr.PreTrainedModel]) -> None:
    name, model = named_model
    windows = layer_windows(model.config)
    assert windows == WINDOWS.get(name, [None] * 4)
    for module, window in zip(attention_modules(model), windows, strict=True):
        assert getattr(module, "sliding_window", window) == window


def test_a_mask_made_from_the_table_equals_the_stock_mask(
    named_model: tuple[str, tr.PreTrainedModel],
) -> None:
    """The only proof that counts: logits with our mask are bit-equal to the logits without one."""
    _, model = named_model
    num_rows = 16
    ids = torch.arange(num_rows)[None] + 3
    query, key = torch.arange(num_rows)[:, None], torch.arange(num_rows)[None, :]

    def mask(window: int | None) -> torch.Tensor:
        visible = (key <= query) & (key > query - (window or num_rows))
        return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]

    windows = layer_windows(model.config)
    window = next((w for w in windows if w is not None), None)
    if find_family(model).mask_kind == "single":
        assert len(set(windows)) == 1
        ours: Any = mask(window)
    else:
        ours = {"full_attention": mask(None), "sliding_attention": mask(window)}
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, attention_mask=ours).logits)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tr.Qwen3NextConfig(num_hidden_layers=4), "Layer 0 .*linear attention"),
        (tr.Qwen3_5TextConfig(num_hidden_layers=4), "Layer 0 .*linear attention"),
        (tr.MambaConfig(num_hidden_layers=2), "Layer 0 .*state-space"),
        (tr.JambaConfig(num_hidden_layers=8), "Layer 0 .*state-space"),
        (tr.DeepseekV3Config(num_hidden_layers=2), r"Layer 0 .*multi-head latent attention \(MLA\)"),
        (tr.GPT2Config(n_layer=1), "'gpt2' are not supported: choose one of Llama, .* and SmolLM3"),
    ],
    ids=["qwen3-next", "qwen3.5", "mamba", "jamba", "deepseek-v3", "gpt2"],
)
def test_other_architectures_are_refused_by_layer_and_kind(config: tr.PreTrainedConfig, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        find_family(config)
    assert "\n" not in str(caught.value)


def test_bidirectional_gemma_is_refused() -> None:
    config = tr.Gemma3TextConfig(**_SIZES, use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModelError, match="bidirectional"):
        find_family(config)


def test_a_foreign_layer_inside_a_known_family_is_named() -> None:
    model = build(CONFIGS["llama"])
    family = find_family(model)
    model.model.layers[2].self_attn.kv_a_proj_with_mqa = model.model.layers[2].self_attn.k_proj
    del model.model.layers[2].self_attn.k_proj
    with pytest.raises(UnsupportedModelError, match=r"Layer 2 .*MLA"):
        check_layers(model, family)
    del model.model.layers[1].self_attn
    model.model.layers[1].linear_attn = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"Layer 1 .*linear attention"):
        check_layers(model, family)


def test_context_ends_where_the_rotary_table_would_change() -> None:
    assert context_length(CONFIGS["llama"]) == 128
    assert context_length(CONFIGS["gemma3"]) == 128
    long = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    sizes = {k: v for k, v in _SIZES.items() if k != "head_dim"}
    phi = tr.Phi3Config(**sizes, original_max_position_embeddings=32, rope_parameters=dict(long))
    assert context_length(phi) == 32
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert context_length(tr.LlamaConfig(**_SIZES, rope_parameters=dict(dynamic))) == 128
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    assert context_length(tr.LlamaConfig(**_SIZES, rope_parameters=dict(yarn))) == 128
