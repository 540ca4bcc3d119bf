"""Trains one view in several processes: each has all weights (DDP) or a shard of them (FSDP2)."""

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
    """The index of this process and the number of processes, under `torchrun`, `accelerate launch`, or alone."""
    # On the CPU, accelerate looks for other processes only on request.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def loading_device(config: TrainConfig) -> str:
    """The device on which each process loads the base before `Processes.share` places it.

    With shards it is the CPU. Weights in the dtype of their files stay memory-mapped, which all processes of a machine
    share, and go to the device layer by layer. So no device holds the whole base at the start.
    """
    process = this_process()
    return "cpu" if _is_sharded(config, process.num_processes) else str(process.device)


def _is_sharded(config: TrainConfig, num_processes: int) -> bool:
    return config.sharding == "fsdp2" and num_processes > 1


class Processes:
    """The processes of a run and the training pass that they share.

    With `sharding: fsdp2` each process holds one part of every weight, gradient and optimizer tensor, and gathers a
    decoder layer when a pass needs it. For a single process both settings are the same.
    """

    def __init__(self, config: TrainConfig) -> None:
        this_process()
        # Each pass sets its precision. Accelerate would fix it for all later runs of this process.
        self._accelerator = Accelerator(mixed_precision="no")
        self._bfloat16 = config.dtype == "bfloat16"
        self.count: int = self._accelerator.num_processes
        self.index: int = self._accelerator.process_index
        self.is_main: bool = self._accelerator.is_main_process
        self.sharded = _is_sharded(config, self.count)
        # A separate group on the CPU, because a save in the background communicates at the same time as the training.
        self.cpu_group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._training: Any = None

    def share(self, training: TrainingPass) -> None:
        """Distribute the pass over the processes. With shards, this replaces its parameters by other objects.

        The wrapping is our own, because accelerate's would keep the frozen base in float32.
        """
        if not self.sharded:
            self._training = self._accelerator.prepare_model(training)
            return
        mesh = init_device_mesh(self._accelerator.device.type, (self.count,))
        # Twins are sent in the precision of their use. Their shards and the sums of gradients stay float32. The pass
        # casts its own inputs.
        half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = half if self._bfloat16 else MixedPrecisionPolicy()
        for layer in training.dual.base.get_decoder().layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        # The rest: embeddings, last norm and head, which the losses call again in the backward pass.
        self._training = fully_shard(training, mesh=mesh, reshard_after_forward=False, mp_policy=policy)

    def gradients(self, batch: BlockBatch, *, counts: bool, last: bool) -> StepOutput:
        """Add the gradients of a micro-batch's summed loss. After the last one they are averaged over processes.

        counts: False for a pass that this process makes only because others make one. It adds nothing.
        """
        # With shards every pass sends its gradients, because keeping them would take the memory of all gradients.
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
        """Whether the flag is set in any process, so that all processes stop at the same step."""
        if self.count == 1:
            return flag
        device = self._accelerator.device
        return bool(self._accelerator.reduce(torch.tensor(int(flag), device=device), "sum"))

    def first_problem(self, problem: str | None) -> str | None:
        """The problem of the first process that has one. Every process gets it."""
        if self.cpu_group is None:
            return problem
        problems: list[str | None] = [None] * self.count
        dist.all_gather_object(problems, problem, group=self.cpu_group)
        return next((found for found in problems if found is not None), None)

    def close(self) -> None:
        """Leave the group. No save may be in progress."""
        if self.cpu_group is not None:
            dist.destroy_process_group(self.cpu_group)
            self.cpu_group = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A context in which every process holds all weights as plain tensors, so a pass needs no other process."""
        gathered = self.gather()
        yield
        # Not in a `finally`: after an error, processes that fail one by one would wait for each other.
        for parameter, data in gathered:
            parameter.data = data
        for module in self._shards():
            if module is not self._training:
                module.set_reshard_after_forward(True, recurse=False)
            module.reshard()

    def gather(self) -> list[tuple[Tensor, Tensor]]:
        """Make every process hold all weights, the trained ones in float32. All processes must call this.

        Returns the trained parameters, each with the data that was gathered for a pass of the training.
        """
        if not self.sharded:
            return []
        # Without it, and before the first step, the first layer that runs would become the root module.
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
    """The whole tensor. For a sharded one, all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
