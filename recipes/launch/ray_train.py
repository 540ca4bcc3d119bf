"""Train on a Ray cluster: one process a GPU, each of which runs the same command.

    python recipes/launch/ray_train.py 16 recipes/qwen3-paper.yaml sharding=fsdp2

Recipe, corpus and OUTPUT must lie where all workers can read them. A worker that is lost takes the others along; Ray
starts all of them again, and the run goes on from its last save.
"""

import sys

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(config: dict[str, list[str]]) -> None:
    """One worker: Ray has set up the process group and torchrun's variables."""
    from orthrus.cli.app import main

    try:
        main(["train", *config["arguments"]])
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"orthrus train ended with status {end.code}") from end


if __name__ == "__main__":
    number, *arguments = sys.argv[1:]
    TorchTrainer(
        work,
        train_loop_config={"arguments": arguments},
        scaling_config=ScalingConfig(num_workers=int(number), use_gpu=True),
        run_config=RunConfig(name="orthrus", failure_config=FailureConfig(max_failures=10)),
    ).fit()
