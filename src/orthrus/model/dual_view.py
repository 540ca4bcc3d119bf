"""The frozen base with its second view: the modules and their common parts. Runners run the passes."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.base.families import Family
from orthrus.errors import CheckpointError
from orthrus.model.passes import MASK_EMBEDDING
from orthrus.model.repair import RepairHead
from orthrus.model.twin import inject, stock, twins
from orthrus.model.view_config import ViewConfig


class DualView(nn.Module):
    """Twins injected into a stock model.

    base: the stock model, whose attention projections become twins. The mask embedding (C,) exists only for views
    without a mask token id. seed: for the random initial values of low-rank twins. Raises CheckpointError if `config`
    names a mask token, layers or twins that this base does not have.

    precision: "int8" or "int4" if linear layers were quantised after loading, otherwise None. draft_precision: the same
    for the layers of block rows. draft_ids_N: the ids that drafts may propose, None for all.
    """

    precision: str | None = None
    draft_precision: str | None = None

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
        if config.repair_rank is not None:
            self.add_repair(config.repair_rank, seed)
        self.draft_head: nn.Module | None = None
        self.draft_ids_N: Tensor | None = None
        self._num_view_parameters: int | None = None

    def add_repair(self, rank: int, seed: int = 0) -> None:
        """Give the view a repair head, which has no effect before it is trained."""
        size = int(self.base.get_input_embeddings().weight.shape[1])  # type: ignore[index]
        self.config = replace(self.config, repair_rank=rank)
        self.repair = RepairHead(size, rank, seed).to(self.device, self.dtype)

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the number of ids that the model knows."""
        return len(self.base.get_input_embeddings().weight)  # type: ignore[arg-type]

    @property
    def logit_cap(self) -> float | None:
        """The cap of the head's logits, which this family applies with a tanh; None for most families."""
        return getattr(self.base.config, "final_logit_softcapping", None)

    @property
    def mask_token_id(self) -> int:
        """The token id of mask rows in a pass: the mask token's id, or the placeholder for the trained embedding."""
        return MASK_EMBEDDING if self.config.mask_token_id is None else self.config.mask_token_id

    def head(self, hidden: Tensor, *, drafts: bool = False) -> Tensor:
        """Final hidden states (..., C) to logits (..., V), as the stock model projects them.

        drafts: the rows are block rows, which may have a head of lower precision, or of some ids only. All other ids
        then get minus infinity.
        """
        head: nn.Module = self.base.get_output_embeddings()
        if drafts and self.draft_head is not None:
            head = self.draft_head
        return self.finished(head(hidden), drafts=drafts)

    def finished(self, logits: Tensor, *, drafts: bool = False) -> Tensor:
        """Logits over the whole vocabulary from the head's product, capped if the family does so."""
        cap = self.logit_cap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        if not drafts or self.draft_ids_N is None:
            return logits
        every = logits.new_full((*logits.shape[:-1], self.vocab_size), -torch.inf)
        return every.index_copy_(-1, self.draft_ids_N, logits)

    def embed(self, token_ids_BT: Tensor, *, has_masks: bool = True) -> Tensor:
        """Token embeddings (B, T, C), with the mask embedding for the ids of masks. has_masks: there are such ids."""
        embed_tokens = self.base.get_input_embeddings()
        if self.mask_embedding is None or not has_masks:
            return embed_tokens(token_ids_BT)  # type: ignore[no-any-return]
        embeds_BTC = embed_tokens(token_ids_BT.clamp_min(0))
        return torch.where(
            (token_ids_BT < 0)[..., None], self.mask_embedding.to(embeds_BTC.dtype), embeds_BTC
        )

    def mask_argument(self, full: Tensor, windowed: Tensor) -> "Tensor | dict[str, Tensor]":
        """Ready masks (B, 1, rows, keys) in the form of this family's stock forward."""
        if self.family.mask_kind == "by_layer_type":
            return {"full_attention": full, "sliding_attention": windowed}
        return windowed

    def stock(self) -> PreTrainedModel:
        """The untouched base model without twins: another module tree over the same weights."""
        return stock(self.base)

    def view_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name: diffusion sides of the twins, mask embedding, repair head."""
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
        """Number of parameters of the view as it was loaded, because quantised layers hold no parameters."""
        if self._num_view_parameters is not None:
            return self._num_view_parameters
        return sum(p.numel() for p in self.view_parameters().values())

    def count_view_parameters(self) -> None:
        """Store the number of the view's parameters. Call it before they are quantised."""
        self._num_view_parameters = self.num_view_parameters()


def in_window(visible_BTS: Tensor, query_BT: Tensor, key_BS: Tensor, window: int) -> Tensor:
    """`visible` cut to a sliding window over the positions of query rows and keys.

    A row sees at most `window` positions up to and including its own. Block rows after it stay visible.
    """
    return visible_BTS & (query_BT[:, :, None] - key_BS[:, None] < window)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `visible` (bool, any shape) is true, otherwise the smallest number of `dtype`."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)


def _initial_mask_embedding(base: PreTrainedModel) -> Tensor:
    """The mean token embedding (C,), which is neutral and has the scale that the first layer expects."""
    embed_tokens = base.get_input_embeddings()
    weight_VC: Tensor = embed_tokens.weight.detach()  # type: ignore[operator]
    scale = getattr(embed_tokens, "scalar_embed_scale", 1.0)
    return (weight_VC.float().mean(0) * scale).to(weight_VC.dtype)
