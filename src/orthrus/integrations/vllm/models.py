"""vLLM's models with twins of the attention projections, and the pass that drafts through them.

The AR view is vLLM's own forward, untouched. Shapes: R rows of a draft pass, A of them AR rows, C hidden size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from orthrus.errors import UnsupportedModelError
from orthrus.integrations.vllm.settings import view_config
from orthrus.integrations.vllm.versions import check_version
from orthrus.model.repair import RepairHead

check_version()


class DraftRows(NamedTuple):
    """The rows of a draft pass on the device: AR rows first, then blocks. `ar` and `blocks` say what attention
    reads and writes for each of the two; `ar` is None without a floor."""

    token_ids_R: Tensor
    positions_R: Tensor
    is_mask_R: Tensor
    num_ar_rows: int
    ar: ForwardContext | None
    blocks: ForwardContext


class TwinnedModel:
    """Mixed into a causal language model of vLLM: twins in its layers, mask embedding and repair head.

    Twins have the AR projection's own name and `_diff` behind it, as in files, so vLLM's loader finds them.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        _check_attention(config, vllm_config.model_config.max_model_len)
        self.view = view_config(config)
        chosen = self.view.layers
        for index, layer in enumerate(self.model.layers):  # type: ignore[attr-defined]
            if chosen is None or index in chosen:
                _add_twins(layer.self_attn, f"{prefix}model.layers.{index}.self_attn", config.rms_norm_eps)
        self.mask_embedding: nn.Parameter | None = None
        if self.view.mask_token_id is None:
            self.mask_embedding = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)
        self.repair: RepairHead | None = None
        if self.view.repair_rank is not None:
            place = torch.empty(0)
            # It draws its first weights on the CPU, whatever device vLLM builds on.
            with torch.device("cpu"):
                repair = RepairHead(config.hidden_size, self.view.repair_rank)
            self.repair = repair.to(place.device, place.dtype).requires_grad_(False)
        tensor_parallel = get_tensor_model_parallel_world_size()
        self._reads_head_rows = tensor_parallel == 1 and vllm_config.quant_config is None

    def draft_hidden(self, rows: DraftRows) -> Tensor:
        """Final hidden states of all rows, hidden_RC, ready for `compute_logits`."""
        decoder: Any = self.model  # type: ignore[attr-defined]
        x_RC = decoder.embed_input_ids(rows.token_ids_R)
        if self.mask_embedding is not None:
            x_RC = torch.where(rows.is_mask_R[:, None], self.mask_embedding.to(x_RC.dtype), x_RC)
        residual_RC = None
        for layer in decoder.layers:
            if residual_RC is None:
                residual_RC, x_RC = x_RC, layer.input_layernorm(x_RC)
            else:
                x_RC, residual_RC = layer.input_layernorm(x_RC, residual_RC)
            x_RC = _attend(layer.self_attn, x_RC, rows)
            x_RC, residual_RC = layer.post_attention_layernorm(x_RC, residual_RC)
            x_RC = layer.mlp(x_RC)
        hidden_RC: Tensor = decoder.norm(x_RC, residual_RC)[0]
        return hidden_RC

    def repair_change(self, hidden_NC: Tensor, parent_ids_N: Tensor, child_ids_NM: Tensor) -> Tensor:
        """What the token before each row adds to the logits of its candidates, changes_NM float32."""
        assert self.repair is not None, "the view has no repair head"
        embeds_NC = self.model.embed_input_ids(parent_ids_N)  # type: ignore[attr-defined]
        change_NC = self.repair(hidden_NC, embeds_NC).to(hidden_NC.dtype)
        if self._reads_head_rows:
            rows_NMC = self.lm_head.weight[child_ids_NM]  # type: ignore[attr-defined]
            changes_NM: Tensor = (rows_NMC.float() @ change_NC.float()[..., None])[..., 0]
            return changes_NM
        # The head's rows lie on several devices, or are packed: it projects both, and the difference counts.
        both = torch.cat([hidden_NC + change_NC, hidden_NC])
        moved_NV, before_NV = self.compute_logits(both).float().chunk(2)  # type: ignore[attr-defined]
        return (moved_NV - before_NV).gather(-1, child_ids_NM)  # type: ignore[no-any-return]


class OrthrusLlama(TwinnedModel, LlamaForCausalLM):
    """Llama."""


class OrthrusQwen2(TwinnedModel, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class OrthrusQwen3(TwinnedModel, Qwen3ForCausalLM):
    """Qwen3, and the released Orthrus-Qwen3 layout."""


class OrthrusMistral(TwinnedModel, MistralForCausalLM):
    """Mistral."""


def _check_attention(config: Any, max_length: int) -> None:
    """UnsupportedModelError for attention that a draft pass would compute otherwise than our own runners."""
    for key in ("llama_4_scaling", "dual_chunk_attention_config", "ada_rms_norm_t_cond"):
        if getattr(config, key, None):
            raise UnsupportedModelError(
                f"this model's config.json asks for {key}, which the draft pass in vLLM does not know: "
                "serve it with `orthrus serve`."
            )
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = "sliding_attention" in kinds if kinds else getattr(config, "model_type", "") == "mistral"
    window = getattr(config, "sliding_window", None) if windowed else None
    if window is not None and max_length > window:
        raise UnsupportedModelError(
            f"the draft pass in vLLM has no sliding window: add --max-model-len {window}, or serve the model "
            "with `orthrus serve`."
        )


def _add_twins(attention: Any, prefix: str, norm_eps: float) -> None:
    """Diffusion twins of the projections (and norms) of one attention module, never quantised."""
    ar, out = attention.qkv_proj, attention.o_proj
    attention.qkv_proj_diff = QKVParallelLinear(
        ar.hidden_size,
        attention.head_dim,
        attention.total_num_heads,
        attention.total_num_kv_heads,
        bias=ar.bias is not None,
        prefix=f"{prefix}.qkv_proj_diff",
    )
    attention.o_proj_diff = RowParallelLinear(
        out.input_size, out.output_size, bias=out.bias is not None, prefix=f"{prefix}.o_proj_diff"
    )
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            setattr(attention, f"{name}_diff", RMSNorm(attention.head_dim, eps=norm_eps))


def _attend(attention: Any, x_RC: Tensor, rows: DraftRows) -> Tensor:
    """One layer's attention: AR rows write and read the anchors' slots first, then the blocks take them over."""
    num_ar = rows.num_ar_rows
    parts = []
    if rows.ar is not None:
        with override_forward_context(rows.ar):
            parts.append(_through(attention, "", x_RC[:num_ar], rows.positions_R[:num_ar]))
    twin = "_diff" if hasattr(attention, "qkv_proj_diff") else ""
    with override_forward_context(rows.blocks):
        parts.append(_through(attention, twin, x_RC[num_ar:], rows.positions_R[num_ar:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _through(attention: Any, twin: str, x_RC: Tensor, positions_R: Tensor) -> Tensor:
    """Rows of one view through its projections and the one attention module, whose cache both share."""
    qkv, _ = getattr(attention, f"qkv_proj{twin}")(x_RC)
    q, k, v = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    if hasattr(attention, "q_norm"):
        q = _per_head(getattr(attention, f"q_norm{twin}"), q, attention.head_dim)
        k = _per_head(getattr(attention, f"k_norm{twin}"), k, attention.head_dim)
    q, k = attention.rotary_emb(positions_R, q, k)
    out, _ = getattr(attention, f"o_proj{twin}")(attention.attn(q, k, v))
    return out  # type: ignore[no-any-return]


def _per_head(norm: nn.Module, x: Tensor, head_dim: int) -> Tensor:
    normed: Tensor = norm(x.unflatten(-1, (-1, head_dim)).contiguous())
    return normed.flatten(-2)
