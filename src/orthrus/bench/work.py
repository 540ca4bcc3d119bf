"""Arithmetic and bytes of decoding, from counters: what passes fed, and what one row or pass of the model takes."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from orthrus.base.families import decoder_layers
from orthrus.bench.cycles import Call
from orthrus.model.dual_view import DualView
from orthrus.model.pool import head_dim, slot_bytes
from orthrus.model.twin import LowRankTwin, Twin

# Of quantised linears: what stands beside the weights for one kernel only.
_HELPERS = ("prepacked", "zeros_N", "one", "zero_point")


@dataclass(frozen=True, slots=True)
class Work:
    """What the passes of an answer fed and read after its first token.

    pairs: (row, position that it reads) in a layer. history: positions of history that passes read, each once a
    pass. head_rows: rows projected to the vocabulary; draft_head_rows those of them that were drafts'.
    head_calls, draft_head_calls: how often the head's weights were read.
    """

    ar_rows: int = 0
    diffusion_rows: int = 0
    passes: int = 0
    ar_passes: int = 0
    diffusion_passes: int = 0
    pairs: int = 0
    history: int = 0
    head_rows: int = 0
    head_calls: int = 0
    draft_head_rows: int = 0
    draft_head_calls: int = 0

    @classmethod
    def sum(cls, parts: Iterable["Work"]) -> "Work":
        listed = list(parts)
        return cls(**{name: sum(getattr(part, name) for part in listed) for name in cls.__slots__})

    @property
    def rows(self) -> int:
        return self.ar_rows + self.diffusion_rows


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the model takes: weights that a row is multiplied by, and their bytes.

    shared: linears of the layers without a twin; ar, diffusion: the two sides of the twins. low_rank: diffusion
    rows pass through `ar` as well. attention: 4 x heads x head size x layers, the arithmetic of one pair.
    slot_bytes: keys and values of one position in all layers.
    """

    shared: int
    shared_bytes: int
    ar: int
    ar_bytes: int
    diffusion: int
    diffusion_bytes: int
    low_rank: bool
    head: int
    head_bytes: int
    draft_head: int
    draft_head_bytes: int
    attention: int
    slot_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def flops(self, work: Work) -> int:
        """Multiplications and additions of linears, heads and attention; norms and embeddings are left out."""
        ar_rows = work.rows if self.low_rank else work.ar_rows
        weights = (
            work.rows * self.shared
            + ar_rows * self.ar
            + work.diffusion_rows * self.diffusion
            + work.head_rows * self.head
            + work.draft_head_rows * self.draft_head
        )
        return 2 * weights + self.attention * work.pairs

    def bytes(self, work: Work) -> int:
        """Bytes of weights and of the KV cache that passes read and write, each once a pass.

        A least amount: caches that are too small, and rows between the layers, cost more.
        """
        ar_passes = work.passes if self.low_rank else work.ar_passes
        return (
            work.passes * self.shared_bytes
            + ar_passes * self.ar_bytes
            + work.diffusion_passes * self.diffusion_bytes
            + work.head_calls * self.head_bytes
            + work.draft_head_calls * self.draft_head_bytes
            + (work.history + work.rows) * self.slot_bytes
        )


def sizes_of(dual: DualView, kv_dtype: torch.dtype) -> Sizes | None:
    """The model's sizes, with keys and values in that dtype.

    None where rows choose their weights (experts), so that no one size holds for all.
    """
    config: Any = dual.base.config.get_text_config()
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        return None
    layers = list(decoder_layers(dual.base))
    twins = [module for layer in layers for module in layer.modules() if isinstance(module, Twin)]
    every = [m for layer in layers for m in _linears(layer)]
    ar = [m for twin in twins for m in _linears(twin.ar)]
    diffusion = [m for twin in twins for m in _linears(twin.diffusion)]
    in_twins = {id(m) for m in (*ar, *diffusion)}
    shared = [m for m in every if id(m) not in in_twins]
    head = _linears(dual.base.get_output_embeddings())
    draft_head = head if dual.draft_head is None else _linears(dual.draft_head)
    return Sizes(
        *_size(shared),
        *_size(ar),
        *_size(diffusion),
        any(isinstance(twin, LowRankTwin) for twin in twins),
        *_size(head),
        *_size(draft_head),
        4 * int(config.num_attention_heads) * head_dim(config) * len(layers),
        slot_bytes(config, kv_dtype),
    )


def work_of(calls: Sequence[Call]) -> Work:
    """Of recorded passes of one request."""
    return Work.sum(map(_of_call, calls))


def work_of_stock(num_prompt_tokens: int, num_tokens: int) -> Work:
    """Of the stock model: one pass of one row for each token after the first."""
    num = max(num_tokens - 1, 0)
    history = num * num_prompt_tokens + num * (num - 1) // 2
    return Work(
        ar_rows=num,
        passes=num,
        ar_passes=num,
        pairs=history + num,
        history=history,
        head_rows=num,
        head_calls=num,
    )


def _of_call(call: Call) -> Work:
    p = call.pass_
    num_ar, num_diffusion = p.num_ar_rows, p.num_rows - p.num_ar_rows
    pairs = 0
    for span in p.spans:
        num, tail = span.part.num_rows, span.part.tail_II
        pairs += num * span.length + (num * (num + 1) // 2 if tail is None else int(tail.sum()))
    own = [rows for rows, drafts in call.projected if not drafts]
    drafts = [rows for rows, is_draft in call.projected if is_draft]
    return Work(
        ar_rows=num_ar,
        diffusion_rows=num_diffusion,
        passes=1,
        ar_passes=int(num_ar > 0),
        diffusion_passes=int(num_diffusion > 0),
        pairs=pairs,
        history=sum(span.length for span in p.spans),
        head_rows=sum(own),
        head_calls=len(own),
        draft_head_rows=sum(drafts),
        draft_head_calls=len(drafts),
    )


def _linears(module: nn.Module | None) -> list[nn.Module]:
    """What multiplies rows by a matrix: every linear says its sizes, quantised ones too."""
    found = [] if module is None else list(module.modules())
    return [m for m in found if hasattr(m, "in_features") and hasattr(m, "out_features")]


def _size(linears: Iterable[nn.Module]) -> tuple[int, int]:
    """(weights, bytes)."""
    weights = num_bytes = 0
    for linear in linears:
        weights += int(linear.in_features) * int(linear.out_features)  # type: ignore[arg-type]
        tensors = [*linear.named_parameters(recurse=False), *linear.named_buffers(recurse=False)]
        num_bytes += sum(tensor.nbytes for name, tensor in tensors if name not in _HELPERS)
    return weights, num_bytes
