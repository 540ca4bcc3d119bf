"""The frozen base with its second view: runs passes through the stock transformers forward."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.base.families import Family, sliding_window
from orthrus.errors import CheckpointError
from orthrus.model.attention import folded_heads
from orthrus.model.passes import MASK_EMBEDDING, Pass
from orthrus.model.repair import RepairHead, RepairTables
from orthrus.model.slot_cache import Move, SlotCache
from orthrus.model.twin import inject, stock, twins
from orthrus.model.view_config import ViewConfig

Accelerated = Callable[[Pass, SlotCache], AbstractContextManager[dict[str, Any]]]
"""Puts faster code in place of the stock decoder layers for one pass, and yields what the stock forward must
be given besides; see `DualView.accelerate`."""
Masks = Tensor | dict[str, Tensor]
"""A pass's attention mask, or one for each layer type of the family."""
WholePasses = Callable[[Pass, SlotCache], Tensor | None]
"""Answers for a pass with hidden_BTC of its rows; None where it is to run as ever."""


class DualView(nn.Module):
    """Twins injected into a stock model, and the one call that everything else is made of: `run`.

    base: the stock model, whose attention projections become twins. The mask embedding (C,) exists only
    for views without a mask token id. seed: of what starts random in low-rank twins. Raises CheckpointError
    when `config` names a mask token, layers or twins that this base does not have.

    precision: "int8" or "int4" where linears have been quantised after loading, else None; draft_precision:
    the same of what block rows run through. draft_ids_N: the ids that drafts may propose, None for all.
    runner: "eager", "compiled" or "captured", how passes run.
    """

    precision: str | None = None
    draft_precision: str | None = None
    runner: str = "eager"

    def __init__(self, base: PreTrainedModel, family: Family, config: ViewConfig, *, seed: int = 0) -> None:
        super().__init__()
        num_embeddings = len(base.get_input_embeddings().weight)  # type: ignore[arg-type]
        if config.mask_token_id is not None and not 0 <= config.mask_token_id < num_embeddings:
            raise CheckpointError(
                f"the view's mask token id {config.mask_token_id} is none of this base's {num_embeddings} "
                "embeddings; load it with the base that it was trained on."
            )
        self.base = base
        self.family = family
        self.config = config
        self.split = inject(
            base,
            family,
            config.layers,
            names=config.twins,
            rank=config.rank,
            scale=config.rank_scale,
            seed=seed,
        )
        self.mask_embedding: nn.Parameter | None = None
        if config.mask_token_id is None:
            self.mask_embedding = nn.Parameter(_initial_mask_embedding(base))
        self.repair: RepairHead | None = None
        self.repair_tables: RepairTables | None = None
        if config.repair_rank is not None:
            self.add_repair(config.repair_rank, seed)
        self.draft_head: nn.Module | None = None
        self.draft_ids_N: Tensor | None = None
        self._window = sliding_window(base.config)
        self._accelerated: Accelerated | None = None
        self._whole_passes: WholePasses | None = None
        self._spare_cache: SlotCache | None = None
        self._move: Move | None = None
        self._num_view_parameters: int | None = None
        self._packed_head: nn.Module | None = None
        self._packed_draft_head: nn.Module | None = None

    def add_repair(self, rank: int, seed: int = 0) -> None:
        """Give the view a repair head, which changes nothing before it is trained."""
        size = int(self.base.get_input_embeddings().weight.shape[1])  # type: ignore[index]
        self.config = replace(self.config, repair_rank=rank)
        self.repair, self.repair_tables = RepairHead(size, rank, seed).to(self.device, self.dtype), None

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the ids that the model knows."""
        return len(self.base.get_input_embeddings().weight)  # type: ignore[arg-type]

    @property
    def logit_cap(self) -> float | None:
        """What this family squeezes the head's logits into, by a tanh; None for most."""
        return getattr(self.base.config, "final_logit_softcapping", None)

    @property
    def mask_token_id(self) -> int:
        """What mask rows carry in a pass: the mask token's id, or the stand-in for the trained embedding."""
        return MASK_EMBEDDING if self.config.mask_token_id is None else self.config.mask_token_id

    def new_cache(self, num_slots: int, batch_size: int = 1) -> SlotCache:
        """An empty slot cache that fits this model; `num_slots` counts history and head-room."""
        spare = self._spare_cache
        if spare is not None and batch_size == 1:
            self._spare_cache = None
            spare.clear()
            spare.max_slots = max(num_slots, spare.num_slots)
            spare.ensure(num_slots)
            return spare
        cache = SlotCache(
            self.base.config, num_slots, batch_size=batch_size, dtype=self.dtype, device=self.device
        )
        cache.move = self._move
        return cache

    def hand_on(self, cache: SlotCache) -> None:
        """Take back the cache of a finished request, for the next one, where a runner keeps records on it."""
        if self._whole_passes is not None:
            self._spare_cache = cache

    def run(self, p: Pass, cache: SlotCache) -> Tensor:
        """One pass over rows; returns logits_BRV for the rows `p.logit_rows_R`."""
        return self.head(self.hidden(p, cache)[:, p.logit_rows_R])

    def hidden(self, p: Pass, cache: SlotCache) -> Tensor:
        """One pass over rows, before the head: final hidden states hidden_BTC of all rows.

        For callers who look at the states, or project some rows only after a look at others.
        """
        if p.visible_BTS.device.type == "cpu":
            p.check(cache.lengths)
        if self._whole_passes is not None:
            answer = self._whole_passes(p, cache)
            if answer is not None:
                return answer
        cache.begin(p)
        masks = self.masks(p, cache)
        with self.split.at(p.num_ar_rows), self._fast(p, cache) as more:
            return self.decode(p, cache, masks, **more)

    def decode(self, p: Pass, cache: SlotCache, masks: Masks, **more: Any) -> Tensor:
        """The stock decoder over a pass that `cache` has begun, from embeddings to the last norm."""
        out = self.base.get_decoder()(
            inputs_embeds=self.embed(p.token_ids_BT),
            attention_mask=masks,
            position_ids=p.position_ids_BT,
            past_key_values=cache,
            use_cache=True,
            **more,
        )
        hidden_BTC: Tensor = out.last_hidden_state
        return hidden_BTC

    def _fast(self, p: Pass, cache: SlotCache) -> AbstractContextManager[dict[str, Any]]:
        if self._accelerated is not None:
            return self._accelerated(p, cache)
        return folded_heads(self.base.config, self.device)

    def accelerate(
        self,
        runner: str,
        layers: Accelerated | None = None,
        head: nn.Module | None = None,
        draft_head: nn.Module | None = None,
        *,
        passes: WholePasses | None = None,
        repair_tables: RepairTables | None = None,
        move: Move | None = None,
    ) -> None:
        """From now on run passes inside the context `layers(pass, cache)`, and project with `head`.

        draft_head: the same for a head that drafts have to themselves. passes: is asked first, for the whole
        of a pass before the head. repair_tables: what stands for the repair head. move: what new caches
        gather accepted paths with. All must compute what the stock modules do, up to rounding. Whoever uses
        `base` directly gets the stock modules as ever.
        """
        self.runner, self._accelerated = runner, layers
        self._packed_head, self._packed_draft_head = head, draft_head
        self._whole_passes, self._spare_cache = passes, None
        self.repair_tables, self._move = repair_tables, move

    def head(self, hidden: Tensor, *, drafts: bool = False) -> Tensor:
        """Final hidden states (..., C) to logits (..., V), as the stock model projects them.

        drafts: of block rows, which may have a head of lower precision, or of some ids only: the others have
        minus infinity.
        """
        head = self._packed_head or self.base.get_output_embeddings()
        if drafts and self.draft_head is not None:
            head = self._packed_draft_head or self.draft_head
        logits: Tensor = head(hidden)
        cap = self.logit_cap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        if not drafts or self.draft_ids_N is None:
            return logits
        every = logits.new_full((*logits.shape[:-1], self.vocab_size), -torch.inf)
        return every.index_copy_(-1, self.draft_ids_N, logits)

    def embed(self, token_ids_BT: Tensor) -> Tensor:
        """Token embeddings (B, T, C), the mask embedding where a row asks for it."""
        embed_tokens = self.base.get_input_embeddings()
        if self.mask_embedding is None:
            return embed_tokens(token_ids_BT)  # type: ignore[no-any-return]
        embeds_BTC = embed_tokens(token_ids_BT.clamp_min(0))
        return torch.where(
            (token_ids_BT < 0)[..., None], self.mask_embedding.to(embeds_BTC.dtype), embeds_BTC
        )

    def masks(self, p: Pass, cache: SlotCache) -> Masks:
        """A pass's `visible` as the stock forward's attention mask, windows included."""
        full = windowed = self._mask(p.visible_BTS)
        if self._window is not None:
            visible_BTS = in_window(
                p.visible_BTS, p.position_ids_BT, cache.positions_BS[:, : p.num_slots], self._window
            )
            windowed = self._mask(visible_BTS)
        return self.mask_argument(full, windowed)

    def mask_argument(self, full: Tensor, windowed: Tensor) -> Masks:
        """Ready masks (B, 1, rows, keys) in the form that this family's stock forward takes them."""
        if self.family.mask_kind == "by_layer_type":
            return {"full_attention": full, "sliding_attention": windowed}
        return windowed

    def _mask(self, visible_BTS: Tensor) -> Tensor:
        """(B, 1, T, S): bool for sdpa, additive for eager and flex attention."""
        if self.base.config._attn_implementation == "sdpa":
            return visible_BTS[:, None].contiguous()
        return additive_mask(visible_BTS, self.dtype)[:, None]

    @contextmanager
    def stock(self) -> Iterator[PreTrainedModel]:
        """The untouched base model, twins taken out, for as long as the context lasts."""
        with stock(self.base):
            yield self.base

    def view_parameters(self) -> dict[str, nn.Parameter]:
        """What training may change: diffusion sides of the twins, mask embedding and repair head, by name."""
        found = {
            f"{path}.diffusion.{name}": parameter
            for path, twin in twins(self.base).items()
            for name, parameter in twin.diffusion.named_parameters()
        }
        if self.mask_embedding is not None:
            found["mask_embedding"] = self.mask_embedding
        if self.repair is not None:
            found |= {f"repair.{name}": parameter for name, parameter in self.repair.named_parameters()}
        return found

    def num_view_parameters(self) -> int:
        """Of the view as it was loaded: quantised linears hold none."""
        if self._num_view_parameters is not None:
            return self._num_view_parameters
        return sum(p.numel() for p in self.view_parameters().values())

    def count_view_parameters(self) -> None:
        """Remember their number, before they are quantised."""
        self._num_view_parameters = self.num_view_parameters()


def in_window(visible_BTS: Tensor, query_BT: Tensor, key_BS: Tensor, window: int) -> Tensor:
    """`visible` cut to a sliding window over the positions of query rows and keys.

    A row sees at most `window` positions, itself included, counted back; block rows ahead stay visible.
    """
    return visible_BTS & (query_BT[:, :, None] - key_BS[:, None] < window)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible (bool, any shape), the least number of `dtype` where not."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)


def _initial_mask_embedding(base: PreTrainedModel) -> Tensor:
    """The mean token embedding (C,): neutral, and on the scale that the first layer expects."""
    embed_tokens = base.get_input_embeddings()
    weight_VC: Tensor = embed_tokens.weight.detach()  # type: ignore[operator]
    scale = getattr(embed_tokens, "scalar_embed_scale", 1.0)
    return (weight_VC.float().mean(0) * scale).to(weight_VC.dtype)
