"""How several processes train one view: each with all weights (DDP), or each with its shards (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from orthrus.training.blocks import BlockBatch
from orthrus.training.forward import StepOutput, TrainingPass
from orthrus.training.recipe import TrainConfig


def this_process() -> PartialState:
    """Which of how many processes this is, under `torchrun` or `accelerate launch` or alone."""
    # Accelerate looks for others on the CPU only where it is told to.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def loading_device(config: TrainConfig) -> str:
    """Where each process loads the base before `Processes.share` places it.

    With shards that is the CPU: weights in the dtype of their files stay mapped from them, which all processes of a
    machine share, and go to the device layer by layer. So no device holds the whole base at the start.
    """
    process = this_process()
    return "cpu" if _is_sharded(config, process.num_processes) else str(process.device)


def _is_sharded(config: TrainConfig, num_processes: int) -> bool:
    return config.sharding == "fsdp2" and num_processes > 1


class Processes:
    """The processes of a run and the training pass that they share.

    With `sharding: fsdp2` each holds one part of every weight, gradient and optimizer tensor, and gathers a
    decoder layer when a pass needs it. One process alone has nobody to share with: both settings are one.
    """

    def __init__(self, config: TrainConfig) -> None:
        this_process()
        # Precision is set pass by pass: accelerate would fix it for all later runs of this process.
        self._accelerator = Accelerator(mixed_precision="no")
        self._bfloat16 = config.dtype == "bfloat16"
        self.count: int = self._accelerator.num_processes
        self.index: int = self._accelerator.process_index
        self.is_main: bool = self._accelerator.is_main_process
        self.sharded = _is_sharded(config, self.count)
        # A group of its own, and on the CPU: a save in the background talks at the same time as the training.
        self.cpu_group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._training: Any = None

    def share(self, training: TrainingPass) -> None:
        """Spread the pass over the processes. With shards its parameters are others from here on.

        Our own wrapping, since accelerate's would keep the frozen base in float32.
        """
        if not self.sharded:
            self._training = self._accelerator.prepare_model(training)
            return
        mesh = init_device_mesh(self._accelerator.device.type, (self.count,))
        # Twins travel in the precision that they are used in; their shards and the sums of gradients stay float32.
        # The pass casts its own inputs.
        half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = half if self._bfloat16 else MixedPrecisionPolicy()
        for layer in training.dual.base.get_decoder().layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        # What is left: embeddings, last norm and head, which the losses call again in the backward pass.
        self._training = fully_shard(training, mesh=mesh, reshard_after_forward=False, mp_policy=policy)

    def gradients(self, batch: BlockBatch, *, counts: bool, last: bool) -> StepOutput:
        """Add the gradients of a micro-batch's summed loss; the mean over processes is taken after the last.

        `counts` is false for a pass that is made only because others make one: it adds nothing.
        """
        # With shards every pass hands its gradients over: to wait, each process would hold all of them.
        waiting = nullcontext() if self.sharded or last else self._accelerator.no_sync(self._training)
        device = self._accelerator.device
        with waiting:
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16):
                output: StepOutput = self._training(batch.to(device))
            output = StepOutput(*(t.float() if counts else t.float() * 0 for t in output))
            self._accelerator.backward(output.loss)
        return StepOutput(*(t.detach() for t in output))

    def total(self, output: StepOutput) -> StepOutput:
        """The sums over all processes."""
        return StepOutput(*(self._accelerator.reduce(t, "sum") for t in output))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set anywhere: whoever left at another step would leave the others waiting."""
        if self.count == 1:
            return flag
        device = self._accelerator.device
        return bool(self._accelerator.reduce(torch.tensor(int(flag), device=device), "sum"))

    def first_problem(self, problem: str | None) -> str | None:
        """The first process's problem of those that have one, on every process."""
        if self.cpu_group is None:
            return problem
        problems: list[str | None] = [None] * self.count
        dist.all_gather_object(problems, problem, group=self.cpu_group)
        return next((found for found in problems if found is not None), None)

    def close(self) -> None:
        """Leave the group; nothing may be saving any more."""
        if self.cpu_group is not None:
            dist.destroy_process_group(self.cpu_group)
            self.cpu_group = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, every process holds all weights as plain tensors, and a pass needs no other process."""
        gathered = self.gather()
        yield
        # Not after an error: processes that fail one by one would wait for each other.
        for parameter, data in gathered:
            parameter.data = data
        for module in self._shards():
            if module is not self._training:
                module.set_reshard_after_forward(True, recurse=False)
            module.reshard()

    def gather(self) -> list[tuple[Tensor, Tensor]]:
        """Make every process hold all weights, the trained ones in float32; all of them must call this.

        Returns the trained parameters, each with the data that a pass of the training gathered for it.
        """
        if not self.sharded:
            return []
        # Else the first layer that a decode runs would take itself for the root, where no step came before.
        self._training._get_fsdp_state()._lazy_init()
        trained = {name: plain(p.data) for name, p in self._training.named_parameters() if p.requires_grad}
        for module in self._shards():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        gathered = []
        for name, parameter in self._training.named_parameters():
            if name in trained:
                gathered.append((parameter, parameter.data))
                parameter.data = trained[name]
        return gathered

    def _shards(self) -> list[FSDPModule]:
        if not self.sharded:
            return []
        return [module for module in self._training.modules() if isinstance(module, FSDPModule)]


def plain(tensor: Tensor) -> Tensor:
    """The tensor in full; of one in shards, all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
