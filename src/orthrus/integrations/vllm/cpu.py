"""Worker and runner on a CPU."""

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from orthrus.integrations.vllm.runner import DraftingRunner


class OrthrusCPURunner(DraftingRunner, CPUModelRunner):
    """vLLM's runner, which drafts with the diffusion view."""


class OrthrusCPUWorker(CPUWorker):
    """vLLM's worker with our runner in place of its own, which has loaded nothing yet."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = OrthrusCPURunner(self.vllm_config, self.device)
