"""The sizes of a base and its view, from their configs only: it builds modules without memory and counts them."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from orthrus.base.families import decoder_layers, find_family, rope_tables, sliding_window
from orthrus.base.quiet import quiet_libraries
from orthrus.errors import UserInputError
from orthrus.model.checkpoint import CONFIG_FILE, read_json
from orthrus.model.dual_view import DualView
from orthrus.model.names import REPAIR_PREFIX
from orthrus.model.pool import head_dim
from orthrus.model.twin import LowRank, Twin, twins
from orthrus.model.view_config import ViewConfig
from orthrus.training.plan import Shape
from orthrus.training.recipe import TrainConfig
from orthrus.training.start import DEFAULT_REPAIR_RANK

# Families whose norms multiply by their weights in float32.
_WIDE_NORMS = ("Gemma3", "OLMo2")


def plan_shape(config: PreTrainedConfig, recipe: TrainConfig) -> Shape:
    """Sizes of that base with the view that the recipe trains. They are exact except for the mask.

    With `mask: auto` a spare embedding row is assumed, because only the tokenizer knows whether there is one. A trained
    mask would be one vector more. Raises as `starting_view` for a view that this base cannot have.
    """
    with torch.device("meta"), quiet_libraries():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        dual = DualView(model, find_family(config), _view_config(recipe))
    return shape_of(dual, recipe.train == "view")


def shape_of(dual: DualView, trains_twins: bool = True) -> Shape:
    """The sizes of a view and its base. trains_twins: False if only the repair head is trained."""
    model: Any = dual.base
    config: Any = model.config
    layers = list(decoder_layers(dual.base))
    own = dual.view_parameters()
    of_view = {id(p) for p in own.values()}
    trained = sum(p.numel() for name, p in own.items() if trains_twins or name.startswith(REPAIR_PREFIX))
    every = {id(p): p.numel() for p in model.parameters() if id(p) not in of_view}
    counted = [_own(layer, of_view) for layer in layers]
    there = [i for i, layer in enumerate(layers) if twins(layer)]
    layer = layers[there[0]] if there else layers[0]
    found = {path.rpartition(".")[2]: twin for path, twin in twins(layer).items()}
    low = [twin.diffusion for twin in found.values() if isinstance(twin.diffusion, LowRank)]
    experts = _experts(config, layer)
    return Shape(
        parameters=sum(every.values()),
        root_parameters=sum(every.values()) - sum(counted),
        layer_parameters=max(counted),
        layer_weights=_weights(layer, of_view, experts),
        view_parameters=sum(p.numel() for p in own.values()),
        trained_parameters=trained,
        view_layer_parameters=max(
            sum(p.numel() for p in each.parameters() if id(p) in of_view) for each in layers
        ),
        view_weights=sum(p.numel() for p in layer.parameters() if id(p) in of_view and p.ndim > 1),
        low_rank=bool(low),
        num_layers=len(layers),
        twin_layers=tuple(there),
        hidden=config.hidden_size,
        vocab=dual.vocab_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        mlp=config.moe_intermediate_size if experts else config.intermediate_size,
        hidden_norms=sum(
            type(module).__name__.endswith("Norm")
            for path, module in layer.named_modules()
            if not path.startswith("self_attn")
        ),
        pre_norm=hasattr(layer, "input_layernorm"),
        fused_qkv=hasattr(layer.self_attn, "qkv_proj"),
        head_norms=isinstance(getattr(layer.self_attn, "q_norm", None), nn.Module),
        wide_head_norms=dual.family.name in _WIDE_NORMS,
        trained_head_norms="q_norm" in found,
        qkv_input=not {"q_proj", "k_proj", "v_proj", "qkv_proj"}.isdisjoint(found),
        o_input="o_proj" in found,
        mlp_inputs=_mlp_inputs(config, found),
        rank_values=sum(part.up.in_features for part in low),
        experts=experts,
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        capped_logits=dual.logit_cap is not None,
        rope_tables=len(rope_tables(config)),
        windowed=sliding_window(config) is not None,
        trained_mask=dual.mask_embedding is not None,
        repair_rank=dual.config.repair_rank or 0,
        trains_twins=trains_twins,
    )


def _view_config(recipe: TrainConfig) -> ViewConfig:
    """The config of the view with which the run would start."""
    repair = recipe.repair_rank or (DEFAULT_REPAIR_RANK if recipe.train == "repair" else None)
    mask = None if recipe.mask == "trained" else recipe.mask if isinstance(recipe.mask, int) else 0
    if recipe.init_view is None:
        return ViewConfig(
            block_size=recipe.block_size,
            mask_token_id=mask,
            layers=recipe.layers,
            twins=recipe.twins,
            rank=recipe.rank,
            rank_scale=recipe.rank_scale or 1.0,
            repair_rank=repair,
        )
    folder = Path(recipe.init_view).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise UserInputError(f"init_view: {folder} holds no {CONFIG_FILE}, so it is no view folder.")
    held = ViewConfig.from_dict(read_json(folder / CONFIG_FILE))
    return ViewConfig(
        block_size=recipe.block_size,
        mask_token_id=held.mask_token_id,
        layers=held.layers,
        twins=held.twins,
        rank=held.rank,
        rank_scale=held.rank_scale,
        repair_rank=held.repair_rank or repair,
    )


def _own(layer: nn.Module, of_view: set[int]) -> int:
    """The base's parameters of a layer."""
    return sum(p.numel() for p in layer.parameters() if id(p) not in of_view)


def _weights(layer: nn.Module, of_view: set[int], experts: tuple[int, int] | None) -> int:
    """Weights by which a row is multiplied in a layer: all matrices, but only those of the chosen experts."""
    plain = sum(p.numel() for p in layer.parameters() if id(p) not in of_view and p.ndim == 2)
    if experts is None:
        return plain
    # One stack for all of them, or a matrix each.
    stacked = sum(math.prod(p.shape[1:]) for p in layer.parameters() if p.ndim == 3)
    return plain + stacked * experts[1]


def _experts(config: Any, layer: nn.Module) -> tuple[int, int] | None:
    """(number of experts, number chosen for a row); None for a layer with a plain MLP."""
    number = getattr(config, "num_experts", None)
    if not number or not any(p.ndim == 3 for p in layer.parameters()):
        return None
    return int(number), int(config.num_experts_per_tok)


def _mlp_inputs(config: Any, found: dict[str, Twin]) -> int:
    """Numbers of a row that the twins of an MLP keep for gradients."""
    into = not {"gate_proj", "up_proj", "gate_up_proj"}.isdisjoint(found)
    return int(config.hidden_size) * into + int(config.intermediate_size) * ("down_proj" in found)
