"""Tiny random models of every family, disturbed views, and a byte tokenizer: instant, offline, CPU."""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from orthrus.base.families import find_family
from orthrus.model.dual_view import DualView
from orthrus.model.view_config import ViewConfig

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MIXED = ["full_attention", "sliding_attention"]

FAMILY_CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "llama-tied": LlamaConfig(**COMMON, tie_word_embeddings=True, attention_bias=True),
    "qwen2": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=12, layer_types=_MIXED),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "qwen3-sliding": Qwen3Config(
        **COMMON, head_dim=16, use_sliding_window=True, sliding_window=12, layer_types=_MIXED
    ),
    "mistral": MistralConfig(**COMMON, sliding_window=12),
    "mistral-full": MistralConfig(**COMMON, sliding_window=None),
    "gemma2": Gemma2Config(
        **COMMON, head_dim=16, sliding_window=12, query_pre_attn_scalar=16, tie_word_embeddings=False
    ),
    "gemma3": Gemma3TextConfig(
        **COMMON,
        head_dim=16,
        sliding_window=12,
        layer_types=_MIXED,
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,
    ),
    "phi3": Phi3Config(**COMMON, sliding_window=12),
    "olmo2": Olmo2Config(**COMMON),
    "smollm3": SmolLM3Config(**COMMON, no_rope_layers=[1, 0], layer_types=["full_attention"] * 2),
    "qwen3-moe": Qwen3MoeConfig(
        **COMMON, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}


VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "no o": {"twins": ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_norm", "k_norm")},
    "rank 4": {"rank": 4},
    "all of the MLP too, rank 4, scale 8": {
        "twins": (
            *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "q_norm", "k_norm"),
            *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
        ),
        "rank": 4,
        "rank_scale": 8.0,
    },
    "rank 3, one layer, no o, trained mask": {
        "twins": ("q_proj", "v_proj", "qkv_proj"),
        "rank": 3,
        "layers": (1,),
        "mask_token_id": None,
    },
}
"""Kinds of views; a family takes of `twins` what it has."""


def variant_of(name: str, variant: str) -> dict[str, Any]:
    """The settings of that variant for a tiny model of that family."""
    settings = dict(VARIANTS[variant])
    if "twins" in settings:
        known = find_family(FAMILY_CONFIGS[name]).known_twins
        settings["twins"] = tuple(twin for twin in settings["twins"] if twin in known)
    return settings


def tiny_model(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """The random model of a family, as `random_model` makes it."""
    return random_model(FAMILY_CONFIGS[name], seed)


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model whose text is varied and yet partly foreseeable without the tokens in between.

    All embeddings share one direction, which steers where attention looks; values and head are blind to it.
    So what comes next hangs on the tokens some way back more than on the last one, and a mask row (nothing
    but that direction) can guess it: drafts are right at times, and wrong at others.
    """
    torch.manual_seed(seed)
    # A config is shared by what is built from it, and a test may change its attention code.
    config = copy.deepcopy(config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    embed_tokens, head = model.get_input_embeddings(), model.get_output_embeddings()
    size = model.config.hidden_size
    shared_C = torch.nn.functional.normalize(torch.randn(size), dim=0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
            elif "post_attention_layernorm" in path and config.model_type.startswith("gemma"):
                # Otherwise every layer drowns the embeddings.
                parameter.fill_(-0.6)
        for module in model.modules():
            for path, values in (("v_proj", 1), ("qkv_proj", 4)):
                if isinstance(projection := getattr(module, path, None), torch.nn.Linear):
                    rows = projection.weight[-projection.out_features // values :]
                    rows.copy_(3.0 * _without(rows, shared_C))
        if head.weight is not embed_tokens.weight:
            head.weight.copy_(4.0 * _without(head.weight, shared_C))
        # Gemma multiplies what it looks up by this.
        scale = float(getattr(embed_tokens, "scalar_embed_scale", 1.0))
        weight = embed_tokens.weight
        weight.copy_((_without(torch.randn(weight.shape), shared_C) / size**0.5 + shared_C) / scale)
        weight[VOCAB - 1] = shared_C / scale
    return model.requires_grad_(False)


def _without(rows_NC: torch.Tensor, direction_C: torch.Tensor) -> torch.Tensor:
    return rows_NC - (rows_NC @ direction_C)[:, None] * direction_C


def tiny_dual(
    name: str = "llama",
    *,
    seed: int = 0,
    block_size: int = 8,
    disturb: float = 0.0,
    mask_token_id: int | None = VOCAB - 1,
    **variant: Any,
) -> DualView:
    """A tiny model with a view; `disturb` adds noise to the twins (0 leaves them equal to the AR ones).

    variant: layers, twins, rank, rank_scale or repair_rank, as in ViewConfig.
    """
    model = tiny_model(name, seed)
    config = ViewConfig(block_size=block_size, mask_token_id=mask_token_id, **variant)
    dual = DualView(model, find_family(model), config)
    disturb_view(dual, disturb)
    return dual


def disturb_view(dual: DualView, amount: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in dual.view_parameters().items():
            # What starts at zero has no scale of its own.
            scale = 0.5 if name.endswith((".up.weight", "repair.out.weight")) else parameter.std()
            parameter.add_(torch.randn(parameter.shape, generator=generator) * amount * scale)


def tiny_prompt(length: int = 9, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB - 1, (length,), generator=generator).tolist()
