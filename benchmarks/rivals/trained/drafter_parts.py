"""What both separate drafters are built of: a decoder layer that reads other rows' keys, and the base's rows to learn
from.

Shapes: B sequences of a batch, T tokens of each, Q query rows, S rows that are read, H heads, M key heads, D their
size, C hidden size, F features (hidden states of some layers, one after the other), N blocks, K rows of a block,
J = K - 1.
"""

from dataclasses import dataclass, field
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from orthrus.model.dual_view import additive_mask
from orthrus.training.blocks import BlockBatch, causal_mask
from orthrus.training.forward import Objective, StepOutput, block_losses


class Read(NamedTuple):
    """Rows that a layer reads: keys (B, M, S, D), already rotated, and values."""

    key_BMSD: Tensor
    value_BMSD: Tensor

    def and_these(self, other: "Read") -> "Read":
        return Read(*(torch.cat(pair, 2) for pair in zip(self, other, strict=True)))


class Sizes(NamedTuple):
    """Of the base, which the drafter's layers share."""

    hidden: int
    inner: int
    heads: int
    key_heads: int
    head: int
    eps: float

    @staticmethod
    def of(config: Any) -> "Sizes":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Sizes(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head,
            config.rms_norm_eps,
        )


class Norm(nn.RMSNorm):
    """In float32, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Attention(nn.Module):
    """Grouped-query attention whose queries read whatever keys they are given. inputs: width of what q, k and v take;
    norms: whether each head of queries and keys is normed."""

    def __init__(self, sizes: Sizes, inputs: int, *, norms: bool) -> None:
        super().__init__()
        self.head = sizes.head
        self.q_proj = nn.Linear(inputs, sizes.heads * sizes.head, bias=False)
        self.k_proj = nn.Linear(inputs, sizes.key_heads * sizes.head, bias=False)
        self.v_proj = nn.Linear(inputs, sizes.key_heads * sizes.head, bias=False)
        self.o_proj = nn.Linear(sizes.heads * sizes.head, sizes.hidden, bias=False)
        self.q_norm = Norm(sizes.head, sizes.eps) if norms else nn.Identity()
        self.k_norm = Norm(sizes.head, sizes.eps) if norms else nn.Identity()

    def read(self, x_BSC: Tensor, turn: tuple[Tensor, Tensor]) -> Read:
        """Keys and values of rows at the positions of `turn`."""
        key_BMSD, value_BMSD = self._heads(self.k_proj(x_BSC)), self._heads(self.v_proj(x_BSC))
        return Read(rotated(self.k_norm(key_BMSD), turn), value_BMSD)

    def forward(
        self, x_BQC: Tensor, turn: tuple[Tensor, Tensor], read: Read, visible_BQS: Tensor | None
    ) -> Tensor:
        """visible: what each query may read; None for all of it."""
        query_BHQD = rotated(self.q_norm(self._heads(self.q_proj(x_BQC))), turn)
        key_BMSD, value_BMSD = (t.to(query_BHQD.dtype) for t in read)
        mask = None if visible_BQS is None else visible_BQS[:, None]
        out_BHQD = F.scaled_dot_product_attention(query_BHQD, key_BMSD, value_BMSD, mask, enable_gqa=True)
        return self.o_proj(out_BHQD.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, x_BQE: Tensor) -> Tensor:
        return x_BQE.unflatten(-1, (-1, self.head)).transpose(1, 2)


class Mlp(nn.Module):
    """The gated one of Llama."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.down_proj = nn.Linear(sizes.inner, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Turns(nn.Module):
    """Cosines and sines of positions, as the base turns its own keys."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._rotary = LlamaRotaryEmbedding(config)

    def forward(self, position_ids_BQ: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(torch.zeros((), device=position_ids_BQ.device), position_ids_BQ)
        return cos[:, None], sin[:, None]


def rotated(x_BHQD: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    low, high = x_BHQD.chunk(2, -1)
    return (x_BHQD * cos + torch.cat([-high, low], -1) * sin).to(x_BHQD.dtype)


def start_small(drafter: nn.Module, seed: int, spread: float = 0.02) -> None:
    """Linears drawn from `seed`; norms stay at one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in drafter.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)


def features_of(hidden_states: tuple[Tensor, ...], layers: tuple[int, ...]) -> Tensor:
    """(B, T, F): what these layers of the base put out, side by side."""
    return torch.cat([hidden_states[layer + 1] for layer in layers], -1)


class Lesson(NamedTuple):
    """The base's rows of one packed sequence: features by layer, and final hidden states, which the head takes."""

    by_layer: dict[int, Tensor]
    final_BTC: Tensor

    def features(self, layers: tuple[int, ...]) -> Tensor:
        return torch.cat([self.by_layer[layer] for layer in layers], -1)


@dataclass
class Lessons:
    """The frozen base run over packed sequences, each kept for the next arm that wants it. seconds: CPU time of every
    one that was asked for, those kept included, so that each arm pays for its own."""

    base: PreTrainedModel
    layers: tuple[int, ...]
    kept: dict[int, tuple[Lesson, float]] = field(default_factory=dict)
    spared_s: float = 0.0

    @torch.no_grad()
    def __call__(self, index: int, batch: BlockBatch) -> Lesson:
        if index in self.kept:
            lesson, seconds = self.kept[index]
            self.spared_s += seconds
            return lesson
        began = process_time()
        mask_B1TT = additive_mask(causal_mask(batch), self.base.dtype)[:, None]
        out = self.base.get_decoder()(
            input_ids=batch.token_ids_BT,
            attention_mask=mask_B1TT,
            position_ids=batch.position_ids_BT,
            use_cache=False,
            output_hidden_states=True,
        )
        by_layer = {layer: out.hidden_states[layer + 1] for layer in self.layers}
        lesson = Lesson(by_layer, out.last_hidden_state)
        self.kept[index] = lesson, process_time() - began
        return lesson


class Drafter(nn.Module):
    """What a separate drafter has in common. base: the frozen model, kept outside of the drafter's parameters;
    targets: layers of it that are read."""

    def __init__(self, base: PreTrainedModel, targets: tuple[int, ...]) -> None:
        super().__init__()
        self.targets = targets
        self._base = [base]

    @property
    def base(self) -> PreTrainedModel:
        return self._base[0]

    def head(self, hidden: Tensor) -> Tensor:
        return self.base.get_output_embeddings()(hidden)  # type: ignore[no-any-return]

    def target_states(self, batch: BlockBatch, features_BTF: Tensor) -> Tensor:
        """Final hidden states (B, N, J, C) of a batch's targets."""
        raise NotImplementedError


class DrafterLearner:
    """Learns from a batch: the losses are those of a view."""

    def __init__(self, drafter: Drafter, lessons: Lessons, objective: Objective) -> None:
        self.drafter, self.lessons, self.objective = drafter, lessons, objective

    def __call__(self, index: int, batch: BlockBatch) -> StepOutput:
        lesson, drafter = self.lessons(index, batch), self.drafter
        hidden_BNJC = drafter.target_states(batch, lesson.features(drafter.targets))
        return block_losses(hidden_BNJC, batch, lesson.final_BTC, drafter.head, self.objective)
