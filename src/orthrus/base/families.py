"""Which families can carry a second view: one row per family, and why the others are refused.

A row names the modules of `self_attn` that become twins, and those of `mlp` that may. Row dimensions are
counted from the end: projections see (B, T, C), so their row dimension is -2; query and key norms see what
the family feeds them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from orthrus.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

MaskKind = Literal["single", "by_layer_type"]

_PLAIN = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_NORMED = (*_PLAIN, *_NORMS)
_FUSED = ("qkv_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between the attention layers of one model family and the next.

    `twin_names` get twins unless a view says otherwise; `mlp_names` are projections of the MLP that get one
    only where a view names them (none where experts take its place).
    `norm_row_dim` is the row dimension of the input of `q_norm` and `k_norm` (None without such norms).
    `mask_kind` is what the stock forward takes as a ready-made `attention_mask`: one 4-D mask for all
    layers, or a dictionary with the keys `full_attention` and `sliding_attention`.
    """

    name: str
    model_types: tuple[str, ...]
    twin_names: tuple[str, ...]
    norm_row_dim: int | None
    mask_kind: MaskKind
    mlp_names: tuple[str, ...] = _MLP

    @property
    def known_twins(self) -> tuple[str, ...]:
        """All modules of a layer that may get a twin, in the order that they run in."""
        return (*self.twin_names, *self.mlp_names)

    def module_of(self, layer: "nn.Module", twin_name: str) -> "nn.Module":
        """The part of a decoder layer that holds the module of that name."""
        return layer.get_submodule("mlp" if twin_name in self.mlp_names else "self_attn")

    def row_dim(self, twin_name: str) -> int:
        """The dimension, counted from the end, that holds the rows in the input of that module."""
        if self.is_norm(twin_name) and self.norm_row_dim is not None:
            return self.norm_row_dim
        return -2

    @staticmethod
    def is_norm(twin_name: str) -> bool:
        """Whether that module is a norm: a vector of weights, no projection."""
        return twin_name in _NORMS


FAMILIES = (
    Family("Llama", ("llama",), _PLAIN, None, "single"),
    Family("Qwen2", ("qwen2",), _PLAIN, None, "by_layer_type"),
    # (B, T, H, D): the norms run per head, before heads and rows are swapped.
    Family("Qwen3", ("qwen3",), _NORMED, -3, "by_layer_type"),
    Family("Qwen3-MoE", ("qwen3_moe",), _NORMED, -3, "single", ()),
    Family("Mistral", ("mistral",), _PLAIN, None, "single"),
    Family("Gemma2", ("gemma2",), _PLAIN, None, "by_layer_type"),
    # (B, H, T, D): Gemma 3 swaps heads and rows first.
    Family("Gemma3", ("gemma3_text",), _NORMED, -2, "by_layer_type"),
    Family("Phi3", ("phi3",), _FUSED, None, "single", ("gate_up_proj", "down_proj")),
    # (B, T, C): OLMo 2 normalises the flat projection over all heads at once.
    Family("OLMo2", ("olmo2",), _NORMED, -2, "single"),
    Family("SmolLM3", ("smollm3",), _PLAIN, None, "by_layer_type"),
)
_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}

# Layer types of transformers configs that are ordinary softmax attention over a KV cache.
_STANDARD_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LAYER_TYPE_WORDS = {
    "linear_attention": "linear attention (a recurrent state)",
    "mamba": "a state-space layer (Mamba)",
    "chunked_attention": "chunked attention",
    "conv": "a convolution",
}
# Submodules that give away what a layer is when it has no standard attention.
_TELLTALE_MODULES = (
    ("kv_a_proj_with_mqa", "multi-head latent attention (MLA)"),
    ("kv_b_proj", "multi-head latent attention (MLA)"),
    ("linear_attn", "linear attention (a recurrent state)"),
    ("in_proj_qkvz", "linear attention (a recurrent state)"),
    ("A_log", "a state-space layer (Mamba)"),
)


def supported_families() -> str:
    """The families of the table as one phrase, for messages."""
    names = [family.name for family in FAMILIES]
    return ", ".join(names[:-1]) + " and " + names[-1]


def find_family(model_or_config: "PreTrainedModel | PreTrainedConfig") -> Family:
    """The table row of a model or of its config.

    Raises:
        UnsupportedModelError: no row fits; the message names the first layer without standard
            attention if the config shows it, else the supported families.
    """
    config: Any = getattr(model_or_config, "config", model_or_config)
    model_type = str(getattr(config, "model_type", None))
    family = _BY_MODEL_TYPE.get(model_type)
    if family is None:
        if (odd := _odd_layer(config)) is not None:
            index, kind = odd
            raise _no_standard_attention(index, kind, model_type)
        raise UnsupportedModelError(
            f"Models of type '{model_type}' are not supported: choose one of {supported_families()}."
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(
            f"Layer 0 of this {family.name} model looks at later tokens (bidirectional attention), so it is "
            "no autoregressive decoder: choose a model that generates text."
        )
    return family


def check_layers(model: "PreTrainedModel", family: Family) -> None:
    """Make sure that every decoder layer has the modules that the family's row names.

    Raises:
        UnsupportedModelError: names the first layer that has not, and what it is instead.
    """
    for index, layer in enumerate(decoder_layers(model)):
        attention = getattr(layer, "self_attn", None)
        if attention is None or any(not hasattr(attention, name) for name in family.twin_names):
            raise _no_standard_attention(index, _layer_kind(layer), str(model.config.model_type))


def attention_modules(model: "PreTrainedModel") -> "list[nn.Module]":
    """The `self_attn` module of every decoder layer, in layer order."""
    return [layer.get_submodule("self_attn") for layer in decoder_layers(model)]


def layer_windows(config: "PreTrainedConfig") -> list[int | None]:
    """The sliding window of every layer as the stock code masks it; None is full attention.

    With window w, the row at position p reads positions p - w + 1 to p.
    """
    family, window = find_family(config), getattr(config, "sliding_window", None)
    num_layers: int = config.num_hidden_layers
    if family.mask_kind == "by_layer_type":
        return [window if kind == "sliding_attention" else None for kind in config.layer_types]
    # Llama and OLMo 2 build a full causal mask, whatever stray field their config may carry.
    windowed = family.name in ("Mistral", "Phi3", "Qwen3-MoE")
    return [window if windowed else None] * num_layers


def sliding_window(config: "PreTrainedConfig") -> int | None:
    """The one window that a model's windowed layers share; None when all its layers see everything."""
    return next((window for window in layer_windows(config) if window is not None), None)


def context_length(config: "PreTrainedConfig") -> int:
    """How many positions the model may use without a change of its rotary table.

    Types `longrope` and `dynamic` recompute the table when a sequence outgrows the original length.
    Rows of one block would then meet another table than one-by-one decoding does, so we stop before.
    """
    limit: int = config.max_position_embeddings
    for rope in rope_tables(config):
        rope_type = str(rope.get("rope_type", "default"))
        if rope_type == "longrope" or "dynamic" in rope_type:
            original = rope.get("original_max_position_embeddings")
            limit = min(limit, int(original) if original is not None else limit)
    return limit


def rope_tables(config: Any) -> list[dict[str, Any]]:
    """The rope parameters: one table, or one per layer type (Gemma 3)."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested = [table for table in parameters.values() if isinstance(table, dict) and "rope_type" in table]
    return nested or [parameters]


def decoder_layers(model: "PreTrainedModel") -> "Iterable[nn.Module]":
    """The decoder layers in their order."""
    layers: Iterable[nn.Module] = model.get_submodule("model.layers").children()
    return layers


def _odd_layer(config: Any) -> tuple[int, str] | None:
    """Index and kind of the first layer that the config declares as something else than attention."""
    text = getattr(config, "text_config", None) or config
    # transformers files Mamba layers under "linear_attention", so the model type is asked first.
    if "mamba" in str(getattr(text, "model_type", "")):
        return 0, _LAYER_TYPE_WORDS["mamba"]
    for field in ("layers_block_type", "layer_types"):
        for index, kind in enumerate(getattr(text, field, None) or ()):
            if kind not in _STANDARD_LAYER_TYPES and kind != "attention":
                return index, _LAYER_TYPE_WORDS.get(kind, str(kind))
    if getattr(text, "kv_lora_rank", None) is not None:
        return 0, "multi-head latent attention (MLA)"
    return None


def _layer_kind(layer: "nn.Module") -> str:
    names = {part for name, _ in layer.named_modules() for part in name.split(".")}
    names |= {name.rsplit(".", 1)[-1] for name, _ in layer.named_parameters()}
    for telltale, kind in _TELLTALE_MODULES:
        if telltale in names:
            return kind
    return f"a {type(getattr(layer, 'self_attn', layer)).__name__}"


def _no_standard_attention(index: int, kind: str, model_type: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Layer {index} of this '{model_type}' model is {kind}, not standard attention, so it cannot carry a "
        f"second view: choose a model of the families {supported_families()}."
    )
