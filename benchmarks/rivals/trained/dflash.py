"""A DFlash drafter (arXiv 2602.06036): a block of masks filled in one pass over features of the base.

Its few layers take keys and values of earlier positions from the base's hidden states, and keep them in a cache of
their own. Row j of a block stands at anchor + j and names the token of its own position; the anchor's row names none.
Embeddings and head are the base's, frozen. The mask is an embedding of its own, as our view's is: this base has no
spare token.
"""

from itertools import pairwise

import torch
from drafter_parts import Attention, Drafter, Mlp, Norm, Read, Sizes, Turns, start_small
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from orthrus.training.blocks import BlockBatch, block_inputs, context_mask

MASK = -1


def spread_layers(num_layers: int, number: int) -> tuple[int, ...]:
    """So many layers of the base from the second to the third last, at equal distances."""
    first, last = 1, max(1, num_layers - 3)
    layers = tuple(round(first + i * (last - first) / max(1, number - 1)) for i in range(number))
    assert all(a < b for a, b in pairwise(layers)), "the base has too few layers"
    return layers


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = Norm(sizes.hidden, sizes.eps)
        self.self_attn = Attention(sizes, sizes.hidden, norms=True)
        self.post_attention_layernorm = Norm(sizes.hidden, sizes.eps)
        self.mlp = Mlp(sizes)

    def forward(
        self, x_BQC: Tensor, turn: tuple[Tensor, Tensor], context: Read, visible_BQS: Tensor | None
    ) -> Tensor:
        normed_BQC = self.input_layernorm(x_BQC)
        read = context.and_these(self.self_attn.read(normed_BQC, turn))
        x_BQC = x_BQC + self.self_attn(normed_BQC, turn, read, visible_BQS)
        return x_BQC + self.mlp(self.post_attention_layernorm(x_BQC))  # type: ignore[no-any-return]


class DFlash(Drafter):
    def __init__(
        self, base: PreTrainedModel, targets: tuple[int, ...], *, num_layers: int = 2, seed: int = 0
    ) -> None:
        super().__init__(base, targets)
        sizes = Sizes.of(base.config)
        self.fc = nn.Linear(len(targets) * sizes.hidden, sizes.hidden, bias=False)
        self.context_norm = Norm(sizes.hidden, sizes.eps)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(num_layers))
        self.norm = Norm(sizes.hidden, sizes.eps)
        self.turns = Turns(base.config)
        self.mask_C = nn.Parameter(base.get_input_embeddings().weight.detach().float().mean(0))  # type: ignore[operator]
        start_small(self, seed)

    def embed(self, token_ids_BQ: Tensor) -> Tensor:
        known_BQC = self.base.get_input_embeddings()(token_ids_BQ.clamp_min(0))
        return torch.where((token_ids_BQ == MASK)[..., None], self.mask_C.to(known_BQC.dtype), known_BQC)

    def context(self, features_BTF: Tensor, position_ids_BT: Tensor) -> list[Read]:
        """What each layer reads of positions that the base has seen."""
        context_BTC = self.context_norm(self.fc(features_BTF))
        turn = self.turns(position_ids_BT)
        return [layer.self_attn.read(context_BTC, turn) for layer in self.layers]

    def forward(
        self,
        token_ids_BQ: Tensor,
        position_ids_BQ: Tensor,
        context: list[Read],
        visible_BQS: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, Q, C) of block rows. visible: over the context's rows, then the block rows."""
        x_BQC, turn = self.embed(token_ids_BQ), self.turns(position_ids_BQ)
        for layer, read in zip(self.layers, context, strict=True):
            x_BQC = layer(x_BQC, turn, read, visible_BQS)
        return self.norm(x_BQC)  # type: ignore[no-any-return]

    def blocks(self, batch: BlockBatch, features_BTF: Tensor) -> Tensor:
        """Final hidden states (B, N, K, C) of isolated blocks; inside a block every row sees every row."""
        token_ids_BNK, position_ids_BNK = block_inputs(batch, MASK)
        num_blocks, size = token_ids_BNK.shape[1:]
        block_Q = torch.arange(num_blocks).repeat_interleave(size)
        own_BQQ = (block_Q[:, None] == block_Q).expand(len(token_ids_BNK), -1, -1)
        visible_BQS = torch.cat([context_mask(batch).repeat_interleave(size, 1), own_BQQ], -1)
        context = self.context(features_BTF, batch.position_ids_BT)
        hidden_BQC = self(token_ids_BNK.flatten(1), position_ids_BNK.flatten(1), context, visible_BQS)
        return hidden_BQC.view(*token_ids_BNK.shape, -1)  # type: ignore[no-any-return]

    def target_states(self, batch: BlockBatch, features_BTF: Tensor) -> Tensor:
        """Row j + 1 of a block is target j."""
        return self.blocks(batch, features_BTF)[:, :, 1:]


class DFlashDrafts:
    """Drafts for one request; keeps keys and values of the base's features."""

    def __init__(self, drafter: DFlash, block_size: int) -> None:
        self.drafter, self.block_size = drafter, block_size
        self.layers = drafter.targets
        self._context: list[Read] | None = None
        self._length = 0

    def __call__(
        self, cache: DynamicCache, known_ids: list[int], features_1NF: Tensor
    ) -> tuple[list[int], list[int]]:
        """(Nothing decided, the block's drafts); see `chain.Drafts`."""
        end = self._length + features_1NF.shape[1]
        new = self.drafter.context(features_1NF, torch.arange(self._length, end)[None])
        old, self._length = self._context, end
        self._context = new if old is None else [a.and_these(b) for a, b in zip(old, new, strict=True)]
        ids_1K = torch.tensor([[known_ids[-1]] + [MASK] * (self.block_size - 1)])
        positions_1K = torch.arange(end, end + self.block_size)[None]
        hidden_1KC = self.drafter(ids_1K, positions_1K, self._context)
        logits_JV = self.drafter.head(hidden_1KC[0, 1:])
        return [], logits_JV.argmax(-1).tolist()
