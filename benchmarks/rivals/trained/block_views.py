"""Views as rivals of separate drafters: ours, and one in the manner of Uno (arXiv 2609.04010), causal in its blocks.

Both learn in our `TrainingPass`. The causal one only puts its own attention in place of the pass's: what a row reads
of its block ends at itself. Unlike Uno's, its later rows carry masks, not random tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from chain import forget
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthrus.model.dual_view import DualView, additive_mask
from orthrus.training.block_attention import BlockContext
from orthrus.training.blocks import BlockBatch
from orthrus.training.forward import StepOutput, TrainingPass

CAUSAL = "rival_causal_blocks"


class ViewLearner:
    """A view's training pass; the sequence's number is not needed: its keys and values are the pass's own affair."""

    def __init__(self, training: TrainingPass) -> None:
        self.training = training

    def __call__(self, index: int, batch: BlockBatch) -> StepOutput:
        output: StepOutput = self.training(batch)
        return output


class CausalPass(TrainingPass):
    """A training pass whose block rows read no later row of their block."""

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        with super()._attention(CAUSAL):
            yield


def causal_blocks(
    module: nn.Module,
    query_BHQD: Tensor,
    key_BMQD: Tensor,
    value_BMQD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    block_context: BlockContext | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers attention interface: one softmax over the base's rows and a row's own block up to itself.

    Shapes: M key heads, G query heads of each, R = G * Q rows of one product, N blocks, K rows of a block, T rows of
    the base. Plain and not the fastest; the pass's own code is for blocks without order.
    """
    assert block_context is not None, "block attention runs only inside a training pass"
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    bias_BQT = block_context.mask(layer)
    assert isinstance(bias_BQT, Tensor), "the dense code takes additive masks"
    far_key, far_value = block_context.keys[layer], block_context.values[layer]
    num_kv, size, dtype = key_BMQD.shape[1], block_context.block_size, far_key.dtype
    scaling = query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling
    query_BMGQD = (query_BHQD * scaling).to(dtype).unflatten(1, (num_kv, -1))
    with torch.autocast(query_BHQD.device.type, enabled=False):
        far_BMGQT = (query_BMGQD @ far_key[:, :, None].mT).float() + bias_BQT[:, None, None].float()
        near_key, near_value = (
            t.to(dtype).unflatten(2, (-1, size))[:, :, None] for t in (key_BMQD, value_BMQD)
        )
        near_BMGNKK = (query_BMGQD.unflatten(3, (-1, size)) @ near_key.mT).float()
        later_KK = torch.ones(size, size, dtype=torch.bool, device=near_key.device).triu(1)
        near_BMGQK = near_BMGNKK.masked_fill(later_KK, -torch.inf).flatten(3, 4)
        share = F.softmax(torch.cat([far_BMGQT, near_BMGQK], -1), -1).to(dtype)
        far_share, near_share = share.split([far_BMGQT.shape[-1], size], -1)
        near_out = (near_share.unflatten(3, (-1, size)) @ near_value).flatten(3, 4)
        out_BMGQD = far_share @ far_value[:, :, None] + near_out
    return out_BMGQD.flatten(1, 2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(CAUSAL, causal_blocks)


class ViewDrafts:
    """Drafts for one request; they read the base's own cache and leave nothing of theirs in it.

    floor: the draft pass carries the anchor as a base row besides, which decides one token and stays in the cache; the
    block's first row, which names that same token, is then of no use. causal: rows of a block read no later ones.
    """

    layers: tuple[int, ...] = ()

    def __init__(self, dual: DualView, block_size: int, *, floor: bool, causal: bool) -> None:
        self.dual, self.floor, self.causal, self.block_size = dual, floor, causal, block_size

    def __call__(
        self, cache: DynamicCache, known_ids: list[int], features_1NF: Tensor
    ) -> tuple[list[int], list[int]]:
        dual, size, num_ar = self.dual, self.block_size, int(self.floor)
        length = len(known_ids) - 1
        block = [known_ids[-1], *[dual.mask_token_id] * (size - 1)]
        ids_1R = torch.tensor([known_ids[-1:] * num_ar + block])
        positions_1R = torch.tensor([[length] * num_ar + [length + j for j in range(size)]])
        visible_RS = torch.ones(num_ar + size, length + num_ar + size, dtype=torch.bool)
        visible_RS[:num_ar, length + num_ar :] = False
        visible_RS[num_ar:, length : length + num_ar] = False
        if self.causal:
            visible_RS[num_ar:, length + num_ar :] = torch.ones(size, size, dtype=torch.bool).tril()
        mask_11RS = additive_mask(visible_RS, dual.dtype)[None, None]
        with dual.split.at(num_ar):
            out = dual.base.get_decoder()(
                inputs_embeds=dual.embed(ids_1R),
                attention_mask=dual.mask_argument(mask_11RS, mask_11RS),
                position_ids=positions_1R,
                past_key_values=cache,
                use_cache=True,
            )
        forget(cache, size)
        # The last row of a block predicts what no block row stands for, and row 0 what the floor decides.
        ids = dual.head(out.last_hidden_state[0, : num_ar + size - 1]).argmax(-1).tolist()
        return ids[:num_ar], ids[2 * num_ar :]
