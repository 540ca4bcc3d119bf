"""An EAGLE-3 drafter (arXiv 2503.01840): one decoder layer that drafts a chain, token by token.

A row at position t takes the embedding of token t + 1 and the fused hidden states of a low, a middle and a high layer
of the base at t; further down the chain, where the base has not been yet, it takes what the drafter itself put out for
the row before. It is trained on chains of its own outputs (training-time test), here as long as those of decoding.
Embeddings and head are the base's, frozen.
"""

import torch
from drafter_parts import Attention, Drafter, Mlp, Norm, Read, Sizes, Turns, start_small
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from orthrus.training.blocks import BlockBatch, causal_mask, context_mask


class Eagle3(Drafter):
    def __init__(self, base: PreTrainedModel, targets: tuple[int, int, int], *, seed: int = 0) -> None:
        super().__init__(base, targets)
        sizes = Sizes.of(base.config)
        self.fc = nn.Linear(len(targets) * sizes.hidden, sizes.hidden, bias=False)
        self.token_norm = Norm(sizes.hidden, sizes.eps)
        self.hidden_norm = Norm(sizes.hidden, sizes.eps)
        self.self_attn = Attention(sizes, 2 * sizes.hidden, norms=False)
        self.post_attention_layernorm = Norm(sizes.hidden, sizes.eps)
        self.mlp = Mlp(sizes)
        self.norm = Norm(sizes.hidden, sizes.eps)
        self.turns = Turns(base.config)
        start_small(self, seed)

    def forward(
        self,
        next_ids_BQ: Tensor,
        state_BQC: Tensor,
        position_ids_BQ: Tensor,
        before: Read | None,
        visible_BQS: Tensor | None,
    ) -> tuple[Tensor, Read]:
        """(States (B, Q, C) before the last norm, what these rows give to read).

        next_ids: the token after each row's position; state: fused features, or the drafter's state of the row before.
        visible: over the rows `before`, then these rows.
        """
        embeds_BQC = self.base.get_input_embeddings()(next_ids_BQ)
        both_BQE = torch.cat([self.token_norm(embeds_BQC), self.hidden_norm(state_BQC)], -1)
        turn = self.turns(position_ids_BQ)
        own = self.self_attn.read(both_BQE, turn)
        read = own if before is None else before.and_these(own)
        state_BQC = state_BQC + self.self_attn(both_BQE, turn, read, visible_BQS)
        return state_BQC + self.mlp(self.post_attention_layernorm(state_BQC)), own

    def chains(self, batch: BlockBatch, features_BTF: Tensor) -> Tensor:
        """Final hidden states (B, N, J, C): step j of the chain at each anchor, fed with the text's own tokens.

        The first step runs over whole sequences, since later steps read all of its keys.
        """
        last = batch.token_ids_BT.shape[1] - 1
        next_BT = batch.token_ids_BT.roll(-1, 1)
        fused_BTC = self.fc(features_BTF)
        state_BTC, far = self(next_BT, fused_BTC, batch.position_ids_BT, None, causal_mask(batch))
        # The anchor is not in the base's cache yet: the chain begins at the row before it.
        begin_BN = batch.anchor_BN - 1
        state_BNC = state_BTC.gather(1, begin_BN[..., None].expand(-1, -1, state_BTC.shape[-1]))
        position_BN = batch.position_ids_BT.gather(1, begin_BN)
        far_BNT = context_mask(batch)
        own_BNN = torch.eye(begin_BN.shape[1], dtype=torch.bool).expand(len(begin_BN), -1, -1)
        states, read, visible_BNS = [state_BNC], far, far_BNT
        for step in range(1, batch.layout.num_targets):
            next_BN = batch.token_ids_BT.gather(1, (batch.anchor_BN + step).clamp_max(last))
            visible_BNS = torch.cat([visible_BNS, own_BNN], -1)
            state_BNC, own = self(next_BN, state_BNC, position_BN + step, read, visible_BNS)
            read = read.and_these(own)
            states.append(state_BNC)
        return self.norm(torch.stack(states, 2))  # type: ignore[no-any-return]

    def target_states(self, batch: BlockBatch, features_BTF: Tensor) -> Tensor:
        """Step j of a chain is target j."""
        return self.chains(batch, features_BTF)


class Eagle3Drafts:
    """Drafts for one request; keeps keys and values of rows whose features the base has given."""

    def __init__(self, drafter: Eagle3, num_drafts: int) -> None:
        self.drafter, self.num_drafts = drafter, num_drafts
        self.layers = drafter.targets
        self._read: Read | None = None
        self._length = 0

    def __call__(
        self, cache: DynamicCache, known_ids: list[int], features_1NF: Tensor
    ) -> tuple[list[int], list[int]]:
        """(Nothing decided, the chain's drafts); see `chain.Drafts`."""
        begin, end = self._length, self._length + features_1NF.shape[1]
        next_ids_1N = torch.tensor([known_ids[begin + 1 : end + 1]])
        far_NS = torch.ones(end - begin, end, dtype=torch.bool).tril(begin)
        state_1NC, own = self.drafter(
            next_ids_1N,
            self.drafter.fc(features_1NF),
            torch.arange(begin, end)[None],
            self._read,
            far_NS[None],
        )
        self._read = own if self._read is None else self._read.and_these(own)
        self._length = end
        drafts: list[int] = []
        state_11C, read = state_1NC[:, -1:], self._read
        while True:
            drafts.append(int(self.drafter.head(self.drafter.norm(state_11C))[0, 0].argmax()))
            if len(drafts) == self.num_drafts:
                return [], drafts
            place_11 = torch.tensor([[end - 1 + len(drafts)]])
            state_11C, own = self.drafter(torch.tensor([drafts[-1:]]), state_11C, place_11, read, None)
            read = read.and_these(own)
