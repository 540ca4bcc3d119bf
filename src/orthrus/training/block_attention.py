"""Attention of isolated blocks over a frozen context, for the training pass of the diffusion view.

Each query reads the AR rows that its block may see, and its own block, both in one softmax. The AR keys are constants:
computing their gradients would be most of the work. The function is registered with transformers under `NAME`, so that
stock attention modules call it. This is the dense code, for any device. `flex_blocks` has the sparse one for GPUs.

On a CPU the blocks are processed a few at a time, each group over only the AR rows that it may read. So the scores of
a group stay in the cache from the product to the softmax and back.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthrus.training.blocks import BlockBatch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NAME = "orthrus_blocks"
_CPU_BLOCKS = 8
"""Blocks of a group on a CPU. Their scores over a few hundred keys fill a second-level cache."""


class BlockGroup(NamedTuple):
    """Blocks `first` to `end` of one sequence of a batch. They read only AR rows `low` to `high`."""

    sequence: int
    first: int
    end: int
    low: int
    high: int


@dataclass(frozen=True, slots=True, eq=False)
class BlockContext:
    """The frozen keys and values of the AR rows that the blocks of a batch read, for each layer (B, H_kv, T, D).

    full, windowed: masks of the N * K = Q query rows, for layers without and with a sliding window. The dense code
    takes additive masks (B, Q, T) over the AR rows, the sparse code a BlockMask over AR rows and block rows. groups:
    the groups in which the dense code processes the blocks.
    """

    keys: list[Tensor]
    values: list[Tensor]
    full: "Tensor | BlockMask"
    windowed: "Tensor | BlockMask"
    windows: list[int | None]
    block_size: int
    groups: tuple[BlockGroup, ...]

    def mask(self, layer: int) -> "Tensor | BlockMask":
        return self.full if self.windows[layer] is None else self.windowed


def block_groups(batch: BlockBatch) -> tuple[BlockGroup, ...]:
    """The blocks of a batch in groups: a few blocks on a CPU, elsewhere all blocks of a sequence over all AR rows."""
    num_sequences, num_blocks = batch.anchor_BN.shape
    num_rows = batch.token_ids_BT.shape[1]
    if batch.anchor_BN.device.type != "cpu":
        return tuple(BlockGroup(sequence, 0, num_blocks, 0, num_rows) for sequence in range(num_sequences))
    # A block reads its document up to its anchor.
    begin_BN = batch.anchor_BN - batch.position_ids_BT.gather(1, batch.anchor_BN)
    return tuple(
        BlockGroup(
            sequence,
            first,
            min(first + _CPU_BLOCKS, num_blocks),
            int(begin_BN[sequence, first : first + _CPU_BLOCKS].min()),
            int(batch.anchor_BN[sequence, first : first + _CPU_BLOCKS].max()),
        )
        for sequence in range(num_sequences)
        for first in range(0, num_blocks, _CPU_BLOCKS)
    )


def block_attention(
    module: nn.Module,
    query_BHQD: Tensor,
    key_BHQD: Tensor,
    value_BHQD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    block_context: BlockContext | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention behind transformers' interface. Returns (B, Q, H, D). `block_context` comes through the forward."""
    assert block_context is not None, "block attention runs only inside a training pass"
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    bias_BQT = block_context.mask(layer)
    assert isinstance(bias_BQT, Tensor), "the dense code takes additive masks"
    context_v = block_context.values[layer]
    # Under autocast, norms give float32 and projections bfloat16. Products need one precision.
    dtype, device = context_v.dtype, query_BHQD.device
    scaling = query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(device.type, enabled=False):
        out_BQHD: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
            (query_BHQD * scaling).to(dtype),
            key_BHQD.to(dtype),
            value_BHQD.to(dtype),
            block_context.keys[layer].to(dtype),
            context_v,
            bias_BQT,
            softcap,
            block_context,
        )
    return out_BQHD, None


class _Attend(torch.autograd.Function):
    """Softmax over a block's AR rows ("far") and its own rows ("near"), of scaled queries.

    It has gradients for the queries, and for the block's own keys and values. Letters: M key heads, G query heads of
    each key head, N blocks of a group, K rows of a block, and R = N * G * K, because the rows that share a key head are
    rows of one product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BHQD: Tensor,
        key_BMQD: Tensor,
        value_BMQD: Tensor,
        context_key_BMTD: Tensor,
        context_value_BMTD: Tensor,
        bias_BQT: Tensor,
        softcap: float | None,
        context: BlockContext,
    ) -> Tensor:
        batch, heads, rows, dim = query_BHQD.shape
        out_BQHD = query_BHQD.new_empty(batch, rows, heads, dim)
        size, num_kv, saved = context.block_size, key_BMQD.shape[1], []
        for group in context.groups:
            q_MNGKD = _folded(query_BHQD[group.sequence], group, num_kv, size)
            k_MNKD, v_MNKD = (_blocks(whole[group.sequence], group, size) for whole in (key_BMQD, value_BMQD))
            q_MRD = q_MNGKD.flatten(1, 3)
            far_MRT = (q_MRD @ context_key_BMTD[group.sequence, :, group.low : group.high].mT).float()
            near_MRK = (q_MNGKD.flatten(2, 3) @ k_MNKD.mT).flatten(1, 2).float()
            slopes: tuple[Tensor, ...] = ()
            if softcap is not None:
                for scores in (far_MRT, near_MRK):
                    scores.div_(softcap).tanh_()
                slopes = (1.0 - far_MRT.square(), 1.0 - near_MRK.square())
                far_MRT, near_MRK = far_MRT.mul_(softcap), near_MRK.mul_(softcap)
            bias_NKT = bias_BQT[group.sequence, _rows(group, size), group.low : group.high].unflatten(
                0, (-1, size)
            )
            far_MRT.view(*q_MNGKD.shape[:-1], -1).add_(bias_NKT[:, None])
            _softmax_(far_MRT, near_MRK)
            far_MRT, near_MRK = far_MRT.to(q_MRD.dtype), near_MRK.to(q_MRD.dtype)
            out_MRD = far_MRT @ context_value_BMTD[group.sequence, :, group.low : group.high]
            near_MNPK = near_MRK.view(*q_MNGKD.shape[:2], -1, size)
            out_MRD += (near_MNPK @ v_MNKD).flatten(1, 2)
            _put(out_BQHD[group.sequence].transpose(0, 1), group, out_MRD.view_as(q_MNGKD))
            saved += [far_MRT, near_MRK, *slopes]
        ctx.save_for_backward(
            query_BHQD, key_BMQD, value_BMQD, context_key_BMTD, context_value_BMTD, out_BQHD, *saved
        )
        ctx.context, ctx.num_saved = context, 2 if softcap is None else 4
        return out_BQHD

    @staticmethod
    def backward(ctx: Any, grad_BQHD: Tensor) -> tuple[Tensor | None, ...]:
        query_BHQD, key_BMQD, value_BMQD, context_key_BMTD, context_value_BMTD, out_BQHD, *saved = (
            ctx.saved_tensors
        )
        context: BlockContext = ctx.context
        size, num_kv = context.block_size, key_BMQD.shape[1]
        grad_query, grad_key, grad_value = (
            torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query_BHQD, key_BMQD, value_BMQD)
        )
        # The term that the softmax subtracts from the gradients of a row's scores.
        shift_BQH1 = (grad_BQHD.float() * out_BQHD.float()).sum(-1, keepdim=True)
        for index, group in enumerate(context.groups):
            far_MRT, near_MRK, *slopes = saved[index * ctx.num_saved : (index + 1) * ctx.num_saved]
            q_MNGKD = _folded(query_BHQD[group.sequence], group, num_kv, size)
            k_MNKD, v_MNKD = (_blocks(whole[group.sequence], group, size) for whole in (key_BMQD, value_BMQD))
            grad_MNPD, shift_MNP1 = (
                _folded(whole[group.sequence].transpose(0, 1), group, num_kv, size).flatten(2, 3)
                for whole in (grad_BQHD, shift_BQH1)
            )
            grad_MRD, shift_MR1 = grad_MNPD.flatten(1, 2), shift_MNP1.flatten(1, 2)
            far_key, far_value = (
                whole[group.sequence, :, group.low : group.high]
                for whole in (context_key_BMTD, context_value_BMTD)
            )
            near_MNPK = near_MRK.view(*grad_MNPD.shape[:3], size)
            _put_blocks(grad_value[group.sequence], group, near_MNPK.mT @ grad_MNPD)
            far_grad = (grad_MRD @ far_value.mT).float().sub_(shift_MR1).mul_(far_MRT)
            near_grad = (grad_MNPD @ v_MNKD.mT).float().sub_(shift_MNP1).mul_(near_MNPK)
            if slopes:
                far_grad.mul_(slopes[0])
                near_grad.mul_(slopes[1].view_as(near_grad))
            near_grad = near_grad.to(q_MNGKD.dtype)
            grad_q_MRD = far_grad.to(q_MNGKD.dtype) @ far_key
            grad_q_MRD += (near_grad @ k_MNKD).flatten(1, 2)
            _put(grad_query[group.sequence], group, grad_q_MRD.view_as(q_MNGKD))
            _put_blocks(grad_key[group.sequence], group, near_grad.mT @ q_MNGKD.flatten(2, 3))
        return (grad_query, grad_key, grad_value, *([None] * 5))


def _rows(group: BlockGroup, size: int) -> slice:
    return slice(group.first * size, group.end * size)


def _places(whole_HQD: Tensor, group: BlockGroup, num_kv: int, size: int) -> Tensor:
    """A view (M, N, G, K, D) of a group's rows."""
    rows: Tensor = whole_HQD[:, _rows(group, size)].unflatten(0, (num_kv, -1)).unflatten(2, (-1, size))
    return rows.transpose(1, 2)


def _folded(whole_HQD: Tensor, group: BlockGroup, num_kv: int, size: int) -> Tensor:
    """A contiguous copy (M, N, G, K, D) of a group's rows."""
    return _places(whole_HQD, group, num_kv, size).contiguous()


def _put(whole_HQD: Tensor, group: BlockGroup, part_MNGKD: Tensor) -> None:
    num_kv, _, _, size, _ = part_MNGKD.shape
    _places(whole_HQD, group, num_kv, size).copy_(part_MNGKD)


def _blocks(whole_MQD: Tensor, group: BlockGroup, size: int) -> Tensor:
    """A view (M, N, K, D) of a group's keys, values or their gradients."""
    blocks: Tensor = whole_MQD[:, _rows(group, size)].unflatten(1, (-1, size))
    return blocks


def _put_blocks(whole_MQD: Tensor, group: BlockGroup, part_MNKD: Tensor) -> None:
    _blocks(whole_MQD, group, part_MNKD.shape[2]).copy_(part_MNKD)


def _softmax_(far_MRT: Tensor, near_MRK: Tensor) -> None:
    """One softmax over both, in place. A block at the beginning of its document has no far rows."""
    top_MR1 = near_MRK.amax(-1, keepdim=True)
    if far_MRT.shape[-1]:
        top_MR1 = torch.maximum(top_MR1, far_MRT.amax(-1, keepdim=True))
    far_MRT.sub_(top_MR1).exp_()
    near_MRK.sub_(top_MR1).exp_()
    scale_MR1 = (far_MRT.sum(-1, keepdim=True) + near_MRK.sum(-1, keepdim=True)).reciprocal_()
    far_MRT.mul_(scale_MR1)
    near_MRK.mul_(scale_MR1)


ALL_ATTENTION_FUNCTIONS.register(NAME, block_attention)
