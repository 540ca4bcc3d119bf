"""The drafter that vLLM builds in each worker: from known tokens and the paged cache to drafts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import ForwardContext, get_forward_context, set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from orthrus.errors import UserInputError
from orthrus.integrations.vllm.chain import walk
from orthrus.integrations.vllm.draft_batch import DraftBatch, Drafting, Ints, draft_batch
from orthrus.integrations.vllm.models import DraftRows, TwinnedModel
from orthrus.integrations.vllm.scheduler import OrthrusScheduler
from orthrus.integrations.vllm.settings import Settings
from orthrus.integrations.vllm.versions import check_version
from orthrus.model.view_config import ViewConfig

_ALL_OPTIONS = (
    "Orthrus needs its own worker and scheduler: pass worker_cls and scheduler_cls as docs/howto/vllm.md says, or take "
    "all options from orthrus.integrations.vllm.names.engine_arguments()."
)


class OrthrusProposer:
    """Named as `model` of vLLM's speculative config, with method `custom_class`.

    Our runner calls `draft`. vLLM's own runners would call `propose`, which sees neither cache nor model, so
    it refuses.
    """

    model: TwinnedModel

    def __init__(self, vllm_config: VllmConfig) -> None:
        check_version()
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise UserInputError(
                "Orthrus drafts through all layers at once: leave out --pipeline-parallel-size."
            )
        if vllm_config.scheduler_config.async_scheduling:
            raise UserInputError(
                "Orthrus drafts after a step's tokens are known: leave out --async-scheduling."
            )
        if not issubclass(vllm_config.scheduler_config.get_scheduler_cls(), OrthrusScheduler):
            raise UserInputError(_ALL_OPTIONS)
        self.vllm_config = vllm_config
        self.settings = Settings.of(vllm_config.additional_config)

    @property
    def view(self) -> ViewConfig:
        return self.model.view

    def load_model(self, target_model: Any) -> None:
        """vLLM calls it once with the served model; UserInputError when that has no diffusion view."""
        if not isinstance(target_model, TwinnedModel):
            raise UserInputError(
                f"{type(target_model).__name__} has no diffusion view: serve a folder of `orthrus export vllm`."
            )
        self.model = target_model
        wanted = self.vllm_config.speculative_config.num_speculative_tokens
        if wanted > self.view.block_size - 1:
            raise UserInputError(
                f"this view drafts {self.view.block_size - 1} tokens at most: lower num_speculative_tokens, "
                f"which is {wanted}."
            )

    def propose(self, *_: Any, **__: Any) -> list[list[int]]:
        raise UserInputError(_ALL_OPTIONS)

    def draft(
        self,
        requests: Sequence[Drafting],
        table_NB: Ints,
        page: int,
        common: CommonAttentionMetadata,
        attn_groups: Sequence[Any],
    ) -> list[list[int]]:
        """Draft token ids of each request, by one pass of the diffusion view over the requests' own cache.

        table_NB, page: the cache blocks of vLLM's whole batch on the host, and slots of a block. common: what
        vLLM's last pass knew of the same batch. attn_groups: the attention groups of the one cache group.
        """
        mask_id = self.view.mask_token_id
        batch = draft_batch(
            requests, table_NB, page, floor=self.settings.floor, mask_id=0 if mask_id is None else mask_id
        )
        rows = self._rows(batch, common, attn_groups)
        hidden_RC = self.model.draft_hidden(rows)
        num_ar = rows.num_ar_rows
        guesses_D = torch.from_numpy(num_ar + batch.guess_rows_D).to(hidden_RC.device)
        read_rows = torch.cat([torch.arange(num_ar, device=hidden_RC.device), guesses_D])
        read_C = hidden_RC[read_rows]
        logits_V = self.model.compute_logits(read_C)  # type: ignore[attr-defined]
        if num_ar:
            parents_N = logits_V[:num_ar].argmax(-1)
            firsts = [[token] for token in parents_N.tolist()]
        else:
            parents_N = torch.tensor([r.anchor_id for r in requests], device=hidden_RC.device)
            firsts = [[] for _ in requests]
        change = None if self.model.repair is None else self.model.repair_change
        chains = walk(read_C[num_ar:], logits_V[num_ar:], batch.num_guesses, parents_N, change)
        return [first + chain for first, chain in zip(firsts, chains, strict=True)]

    def _rows(
        self, batch: DraftBatch, common: CommonAttentionMetadata, attn_groups: Sequence[Any]
    ) -> DraftRows:
        device = common.block_table_tensor.device
        num_ar = batch.num_ar_rows
        slots_R = torch.from_numpy(batch.slots_R).to(device, common.slot_mapping.dtype)
        owners_N = torch.tensor([r.index for r in batch.requests], device=device)
        table_NB = common.block_table_tensor[owners_N]
        ar = None
        if num_ar:
            starts = np.arange(len(batch.requests) + 1)
            ar = self._context(batch, starts, slots_R[:num_ar], table_NB, attn_groups, causal=True)
        blocks = self._context(batch, batch.starts_N1, slots_R[num_ar:], table_NB, attn_groups, causal=False)
        return DraftRows(
            token_ids_R=torch.from_numpy(batch.token_ids_R).to(device),
            positions_R=torch.from_numpy(batch.positions_R).to(device),
            is_mask_R=torch.from_numpy(batch.is_mask_R).to(device),
            num_ar_rows=num_ar,
            ar=ar,
            blocks=blocks,
        )

    def _context(
        self,
        batch: DraftBatch,
        starts_N1: Ints,
        slots_Q: Tensor,
        table_NB: Tensor,
        attn_groups: Sequence[Any],
        *,
        causal: bool,
    ) -> ForwardContext:
        """What attention needs for one of the two kinds of rows: each request's rows end its sequence."""
        device = slots_Q.device
        sizes_N = np.diff(starts_N1)
        lengths_N = np.array([r.num_known - 1 for r in batch.requests]) + sizes_N
        starts = torch.from_numpy(starts_N1.astype(np.int32))
        lengths = torch.from_numpy(lengths_N.astype(np.int32))
        metadata = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(device),
            num_reqs=len(sizes_N),
            num_actual_tokens=int(starts_N1[-1]),
            max_query_len=int(sizes_N.max()),
            max_seq_len=int(lengths_N.max()),
            block_table_tensor=table_NB,
            slot_mapping=slots_Q,
            causal=causal,
            seq_lens_cpu_upper_bound=lengths,
        )
        by_layer: dict[str, Any] = {}
        for group in attn_groups:
            built = group.get_metadata_builder().build(common_prefix_len=0, common_attn_metadata=metadata)
            by_layer |= dict.fromkeys(group.layer_names, built)
        slots = dict.fromkeys(by_layer, metadata.slot_mapping)
        with set_forward_context(
            by_layer, self.vllm_config, num_tokens=metadata.num_actual_tokens, slot_mapping=slots
        ):
            return get_forward_context()
