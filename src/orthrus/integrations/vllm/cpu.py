"""Worker and runner on a CPU.

On a CPU vLLM 0.32.0 verifies drafts of sampled text wrongly, whoever drafts: what should give each drafted row its
request's temperature (`expand_kernel` in `cpu_triton_utils`) writes into a copy, and the rows are divided by
memory that nobody set. So nothing is drafted while a request of the batch samples, and drafts that meet one when
they are verified are left aside: each request then gets one token, by vLLM's ordinary sampler.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from orthrus.integrations.vllm.draft_batch import Drafting
from orthrus.integrations.vllm.runner import DraftingRunner


class OrthrusCPURunner(DraftingRunner, CPUModelRunner):
    """vLLM's runner, which drafts with the diffusion view as long as all requests are greedy."""

    def _drafting(self, num_drafts: int, sampled_token_ids: list[list[int]]) -> list[Drafting]:
        if not self.input_batch.sampling_metadata.all_greedy:
            return []
        return super()._drafting(num_drafts, sampled_token_ids)

    def _sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is None or logits is None or self.input_batch.sampling_metadata.all_greedy:
            return super()._sample(logits, spec_decode_metadata)
        # A request's rows are its last known token's and one for each draft: the first is the plain step's.
        sizes = torch.tensor([1 + num for num in spec_decode_metadata.num_draft_tokens])
        return super()._sample(logits[sizes.cumsum(0) - sizes], None)


class OrthrusCPUWorker(CPUWorker):
    """vLLM's worker with our runner in place of its own, which has loaded nothing yet."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = OrthrusCPURunner(self.vllm_config, self.device)
