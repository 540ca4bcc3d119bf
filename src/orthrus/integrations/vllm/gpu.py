"""Worker and runner on a GPU; not run by us yet."""

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from orthrus.errors import UserInputError
from orthrus.integrations.vllm.runner import DraftingRunner


class OrthrusGPURunner(DraftingRunner, GPUModelRunner):
    """vLLM's runner, which drafts with the diffusion view."""


class OrthrusGPUWorker(Worker):
    """vLLM's worker with our runner in place of its own, which has loaded nothing yet."""

    def init_device(self) -> None:
        super().init_device()
        if self.use_v2_model_runner:
            raise UserInputError("Orthrus subclasses vLLM's V1 runner: unset VLLM_USE_V2_MODEL_RUNNER.")
        self.model_runner = OrthrusGPURunner(self.vllm_config, self.device)
