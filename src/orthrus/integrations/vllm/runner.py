"""What both of our model runners add to vLLM's: drafts from the diffusion view after each step."""

from typing import Any

from vllm.v1.attention.backend import CommonAttentionMetadata

from orthrus.errors import UserInputError
from orthrus.integrations.vllm.draft_batch import Drafting, most_drafts
from orthrus.integrations.vllm.proposer import OrthrusProposer


class DraftingRunner:
    """Mixed in before one of vLLM's model runners."""

    drafter: OrthrusProposer
    input_batch: Any
    requests: dict[str, Any]
    attn_groups: list[list[Any]]
    max_model_len: int

    def _input_fits_in_drafter(self, common_attn_metadata: CommonAttentionMetadata | None) -> bool:
        """Always: a request near the end of the context drafts fewer tokens, and its neighbours as many."""
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        sampling_metadata: Any,
        hidden_states: Any,
        sample_hidden_states: Any,
        aux_hidden_states: Any,
        spec_decode_metadata: Any,
        common_attn_metadata: CommonAttentionMetadata,
        slot_mappings: Any,
    ) -> list[list[int]]:
        """Drafts by request of the batch, none for one that is still in its prompt or about to end."""
        self._draft_probs = self._draft_prob_req_ids = None
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        requests = self._drafting(scheduler_output.num_spec_tokens_to_schedule, sampled_token_ids)
        if not requests:
            return drafts
        if len(self.attn_groups) != 1:
            raise UserInputError(
                f"this model keeps {len(self.attn_groups)} kinds of cache, and Orthrus drafts from one: serve it "
                "with `orthrus serve`."
            )
        table = self.input_batch.block_table[0]
        found = self.drafter.draft(
            requests, table.get_numpy_array(), table.block_size, common_attn_metadata, self.attn_groups[0]
        )
        for request, tokens in zip(requests, found, strict=True):
            drafts[request.index] = tokens
        return drafts

    def _drafting(self, num_drafts: int, sampled_token_ids: list[list[int]]) -> list[Drafting]:
        """The requests that draft, and how much: never into slots that are not the request's own."""
        table = self.input_batch.block_table[0]
        found = []
        for index, tokens in enumerate(sampled_token_ids):
            # Still in its prompt: the token that was drawn is no token of the answer.
            if not tokens:
                continue
            request = self.requests[self.input_batch.req_ids[index]]
            limit = request.sampling_params.max_tokens if request.sampling_params is not None else None
            room = self.max_model_len if limit is None else limit - len(request.output_token_ids)
            num_known = int(self.input_batch.num_tokens_no_spec[index])
            slots = int(table.num_blocks_per_row[index]) * table.block_size
            length = min(self.max_model_len, slots)
            num = most_drafts(num_known, num_drafts, self.drafter.view.block_size, length, room)
            if num > 0:
                found.append(Drafting(index, tokens[-1], num_known, num))
        return found
