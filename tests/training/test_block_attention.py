"""Attention of isolated blocks: the dense formula over all keys, forward and backward, in any groups."""

from types import SimpleNamespace

import pytest
import torch
from tests.packed import pack
from torch import Tensor

from orthrus.model.dual_view import additive_mask
from orthrus.training import block_attention
from orthrus.training.block_attention import BlockContext, block_groups
from orthrus.training.blocks import BlockBatch, BlockLayout, context_mask, draw_blocks
from orthrus.training.corpus import Sample

SIZE = 4


def batch_of(num_anchors: int) -> BlockBatch:
    # The second sequence has few candidates, so that its last anchor is repeated; one prompt is empty.
    samples = [Sample((1,) * n, (2,) * m, "test") for n, m in ((5, 14), (0, 9), (7, 20), (22, 3))]
    sequences = pack(samples, 32)
    return draw_blocks(sequences, range(len(sequences)), num_anchors, BlockLayout(block_size=SIZE))


def dense(query: Tensor, key: Tensor, value: Tensor, context: BlockContext, softcap: float | None) -> Tensor:
    """One softmax over a row of all AR keys and all block keys, masked."""
    batch, heads, rows, dim = query.shape
    group = heads // key.shape[1]
    keys = torch.cat([context.keys[0], key], dim=2).repeat_interleave(group, dim=1)
    values = torch.cat([context.values[0], value], dim=2).repeat_interleave(group, dim=1)
    scores = query @ keys.mT * dim**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    block_Q = torch.arange(rows) // SIZE
    near_BQQ = additive_mask(block_Q[:, None] == block_Q, query.dtype).expand(batch, -1, -1)
    assert isinstance(context.full, Tensor)
    bias_BQS = torch.cat([context.full, near_BQQ], dim=-1)
    return ((scores + bias_BQS[:, None]).softmax(-1) @ values).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("at_once", [1, 3, 50])
@pytest.mark.parametrize("heads", [2, 6])
def test_output_and_gradients_are_those_of_one_dense_softmax(
    softcap: float | None, at_once: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_attention, "_CPU_BLOCKS", at_once)
    batch = batch_of(7)
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_sequences, num_rows = batch.token_ids_BT.shape
    visible_BQT = context_mask(batch).repeat_interleave(SIZE, dim=1)
    context = BlockContext(
        keys=[drawn(num_sequences, 2, num_rows, 8)],
        values=[drawn(num_sequences, 2, num_rows, 8)],
        full=additive_mask(visible_BQT, torch.float64),
        windowed=additive_mask(visible_BQT, torch.float64),
        windows=[None],
        block_size=SIZE,
        groups=block_groups(batch),
    )
    query = drawn(num_sequences, heads, 7 * SIZE, 8).requires_grad_(True)
    key, value = (drawn(num_sequences, 2, 7 * SIZE, 8).requires_grad_(True) for _ in range(2))
    module = SimpleNamespace(layer_idx=0)
    found, _ = block_attention.block_attention(
        module,
        query,
        key,
        value,
        None,
        softcap=softcap,
        block_context=context,  # type: ignore[arg-type]
    )
    expected = dense(query, key, value, context, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    upstream = drawn(*found.shape)
    for ours, theirs in zip(
        torch.autograd.grad(found, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_group_spans_no_more_ar_rows_than_its_blocks_read() -> None:
    batch = batch_of(7)
    visible_BNT = context_mask(batch)
    for group in block_groups(batch):
        read_T = visible_BNT[group.sequence, group.first : group.end].any(0).nonzero()[:, 0].tolist()
        assert (group.low, group.high) == (read_T[0], read_T[-1] + 1) if read_T else group.low == group.high
