"""The training pass: first the frozen AR rows, then many isolated blocks, which read the keys and values of AR rows."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orthrus.base.families import decoder_layers, layer_windows, sliding_window
from orthrus.model.drafting import repaired
from orthrus.model.dual_view import DualView, additive_mask, in_window
from orthrus.training import block_attention, flex_blocks
from orthrus.training.block_attention import BlockContext, block_groups
from orthrus.training.blocks import (
    BlockBatch,
    block_inputs,
    causal_mask,
    context_mask,
    moving_blocks,
    rejected_anchors,
)
from orthrus.training.flex_blocks import flex_masks, pick_attention
from orthrus.training.loss_kinds import LossKind, WeightKind
from orthrus.training.losses import Head, position_weights, row_losses
from orthrus.training.recipe import ActivationKind, AttentionKind

# Rows whose logits are compared at a time.
_PROBED_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The objective: the loss of a row, and the weight of its position in the block."""

    loss: LossKind = "kl"
    weights: WeightKind = "dpace"
    gamma: float = 4.0
    smoothing: float = 0.5


class StepOutput(NamedTuple):
    """Sums over a micro-batch.

    loss, weight: scalars, whose ratio is the loss. hits_J, counts_J: hits and numbers of valid targets by position in
    the block.
    """

    loss: Tensor
    weight: Tensor
    hits_J: Tensor
    counts_J: Tensor


class TrainingPass(nn.Module):
    """Wraps a DualView for training. DDP and FSDP wrap this module, and call `forward(batch)`.

    attention: the code for the blocks; AR rows always use the base's own attention. activations: whether a layer keeps
    all activations for its gradients, or only its input and computes them again.
    """

    def __init__(
        self,
        dual: DualView,
        objective: Objective,
        attention: AttentionKind = "auto",
        activations: ActivationKind = "none",
    ) -> None:
        super().__init__()
        self.dual = dual
        self.objective = objective
        self.attention = attention
        self.activations = activations

    def forward(self, batch: BlockBatch) -> StepOutput:
        """Run one micro-batch. The loss is a sum over weighted targets, not divided by the weight."""
        context, teacher_BTC = self.teacher(batch)
        if batch.layout.rejected_share:
            batch, context = self.moved(batch, context)
        hidden_BNKC = self.blocks(batch, context)
        repair = None if self.dual.repair is None else partial(repaired, self.dual)
        hidden_BNJC = hidden_BNKC[:, :, : batch.layout.num_targets]
        return block_losses(hidden_BNJC, batch, teacher_BTC, self.dual.head, self.objective, repair)

    @torch.no_grad()
    def teacher(self, batch: BlockBatch) -> tuple[BlockContext, Tensor]:
        """The AR pass: keys and values of each layer, and final hidden states (B, T, C) before the head."""
        store = _Store()
        full_BTT, windowed_BTT = self._biases(causal_mask(batch), batch.position_ids_BT, batch)
        hidden_BTC = self._decode(
            batch.token_ids_BT,
            batch.position_ids_BT,
            store,
            self.dual.mask_argument(full_BTT[:, None], windowed_BTT[:, None]),
            num_ar_rows=batch.token_ids_BT.shape[1],
        )
        return self._context(batch, store.keys, store.values), hidden_BTC

    def _context(self, batch: BlockBatch, keys: list[Tensor], values: list[Tensor]) -> BlockContext:
        """The part of the AR pass that the blocks of this batch read."""
        windows, size = layer_windows(self.dual.base.config), batch.layout.block_size
        if pick_attention(self.attention, keys[0].device, keys[0].shape[-1]) == "flex":
            masks = flex_masks(batch, sliding_window(self.dual.base.config))
            return BlockContext(keys, values, *masks, windows, size, ())
        return BlockContext(keys, values, *self._context_biases(batch), windows, size, block_groups(batch))

    @torch.no_grad()
    def moved(self, batch: BlockBatch, context: BlockContext) -> tuple[BlockBatch, BlockContext]:
        """The batch after its moving blocks went to the first wrong guess of the current view."""
        probed = moving_blocks(batch)
        hidden_BMJC = self.blocks(probed, self._context(probed, context.keys, context.values))[:, :, :-1]
        hit_BMJ = torch.zeros_like(probed.valid_BNJ)
        target_BMJ = probed.target_BNJ.flatten(1)
        token_ids, next_ids = (
            probed.token_ids_BT.gather(1, (target_BMJ + ahead).clamp_max(probed.token_ids_BT.shape[1] - 1))
            for ahead in (0, 1)
        )
        keep = probed.valid_BNJ
        for part_R in keep.flatten().nonzero()[:, 0].split(_PROBED_ROWS):
            hidden_RC = hidden_BMJC.flatten(0, 2)[part_R]
            if self.dual.repair is not None:
                hidden_RC = repaired(self.dual, hidden_RC, token_ids.flatten()[part_R])
            logits_RV = self.dual.head(hidden_RC)
            own_R = logits_RV.gather(1, next_ids.flatten()[part_R][:, None])[:, 0]
            # Ties count as hits; argmax is many times slower on a CPU.
            hit_BMJ.view(-1)[part_R] = own_R >= logits_RV.amax(-1)
        # Autocast caches rounded weights. Those of this pass have no gradients, so the cache is cleared.
        torch.clear_autocast_cache()
        batch = rejected_anchors(batch, hit_BMJ)
        return batch, self._context(batch, context.keys, context.values)

    def blocks(self, batch: BlockBatch, context: BlockContext) -> Tensor:
        """The diffusion pass: final hidden states of all block rows, (B, N, K, C)."""
        token_ids_BNK, position_ids_BNK = block_inputs(batch, self.dual.mask_token_id)
        name = block_attention.NAME if isinstance(context.full, Tensor) else flex_blocks.NAME
        with self._attention(name), self._recomputed(name):
            # The mask only keeps the stock code from building one. Our attention uses the context's mask.
            unused = torch.zeros((1, 1, 1, 1), device=token_ids_BNK.device)
            hidden_BQC = self._decode(
                token_ids_BNK.flatten(1),
                position_ids_BNK.flatten(1),
                None,
                self.dual.mask_argument(unused, unused),
                num_ar_rows=0,
                block_context=context,
            )
        return hidden_BQC.view(*token_ids_BNK.shape, -1)

    @property
    def dtype(self) -> torch.dtype:
        return self.dual.base.dtype

    def _decode(
        self,
        token_ids_BT: Tensor,
        position_ids_BT: Tensor,
        store: "_Store | None",
        attention_mask: Any,
        *,
        num_ar_rows: int,
        **kwargs: Any,
    ) -> Tensor:
        with self.dual.split.at(num_ar_rows):
            out = self.dual.base.get_decoder()(
                inputs_embeds=self.dual.embed(token_ids_BT),
                attention_mask=attention_mask,
                position_ids=position_ids_BT,
                past_key_values=store,
                use_cache=store is not None,
                **kwargs,
            )
        return out.last_hidden_state  # type: ignore[no-any-return]

    def _context_biases(self, batch: BlockBatch) -> tuple[Tensor, Tensor]:
        size = batch.layout.block_size
        visible_BQT = context_mask(batch).repeat_interleave(size, dim=1)
        start_BN = batch.position_ids_BT.gather(1, batch.anchor_BN)
        query_BQ = (start_BN[..., None] + torch.arange(size, device=start_BN.device)).flatten(1)
        return self._biases(visible_BQT, query_BQ, batch)

    def _biases(self, visible_BQT: Tensor, query_BQ: Tensor, batch: BlockBatch) -> tuple[Tensor, Tensor]:
        """Additive masks of query rows over the AR rows: (for layers without a window, for layers with one)."""
        full_BQT = additive_mask(visible_BQT, self.dtype)
        window = sliding_window(self.dual.base.config)
        if window is None:
            return full_BQT, full_BQT
        windowed_BQT = in_window(visible_BQT, query_BQ, batch.position_ids_BT, window)
        return full_BQT, additive_mask(windowed_BQT, self.dtype)

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        config = self.dual.base.config
        before, config._attn_implementation = config._attn_implementation, name
        try:
            yield
        finally:
            config._attn_implementation = before

    @contextmanager
    def _recomputed(self, name: str) -> Iterator[None]:
        """A context in which, with `activations: layer`, layers keep only their input and run again for gradients."""
        if self.activations == "none" or not torch.is_grad_enabled():
            yield
            return

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self._block_rows(name)

        layers = list(decoder_layers(self.dual.base))
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        for layer in layers:
            layer.forward = partial(again, layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                # This restores the method of the class.
                del layer.forward

    @contextmanager
    def _block_rows(self, name: str) -> Iterator[None]:
        """The context in which block rows run through the layers."""
        with self._attention(name), self.dual.split.at(0):
            yield


@dataclass(slots=True)
class _Store:
    """A duck-typed cache that keeps each layer's keys and values of the AR pass."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def update(
        self, key_BHTD: Tensor, value_BHTD: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        assert layer_idx == len(self.keys)
        self.keys.append(key_BHTD)
        self.values.append(value_BHTD)
        return key_BHTD, value_BHTD

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def block_losses(
    hidden_BNJC: Tensor,
    batch: BlockBatch,
    teacher_BTC: Tensor,
    head: Head,
    objective: Objective,
    repair: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> StepOutput:
    """The losses of the blocks' targets: row j of a block against the teacher's row at anchor + j.

    hidden, teacher: final hidden states. repair: the repair head, a function from hidden states (R, C) and the tokens
    (R) before their targets to corrected hidden states.
    """
    sequence_length = batch.token_ids_BT.shape[1]
    rows_BNJ = (
        batch.target_BNJ
        + torch.arange(len(batch.token_ids_BT), device=batch.target_BNJ.device)[:, None, None]
        * sequence_length
    )
    corpus_BNJ = batch.token_ids_BT.flatten()[(rows_BNJ + 1).clamp_max(batch.token_ids_BT.numel() - 1)]
    keep = batch.valid_BNJ
    hidden_RC = hidden_BNJC[keep]
    if repair is not None:
        # Row j's target comes after the text's own token at anchor + j.
        hidden_RC = repair(hidden_RC, batch.token_ids_BT.flatten()[rows_BNJ[keep]])
    losses = row_losses(
        objective.loss, hidden_RC, teacher_BTC.flatten(0, 1), rows_BNJ[keep], corpus_BNJ[keep], head
    )
    loss_BNJ, overlap_BNJ, hit_BNJ = (_spread(values_R, keep) for values_R in losses)
    weight_BNJ = position_weights(
        objective.weights,
        overlap_BNJ.detach(),
        keep,
        gamma=objective.gamma,
        smoothing=objective.smoothing,
    )
    return StepOutput(
        loss=(weight_BNJ * loss_BNJ).sum(),
        weight=weight_BNJ.sum(),
        hits_J=hit_BNJ.sum((0, 1)),
        counts_J=keep.sum((0, 1)).float(),
    )


def _spread(values_R: Tensor, keep_BNJ: Tensor) -> Tensor:
    """Values of the kept targets at their (B, N, J) indices, and zeros elsewhere. Differentiable."""
    return torch.zeros(keep_BNJ.shape, dtype=values_R.dtype, device=values_R.device).masked_scatter(
        keep_BNJ, values_R
    )
