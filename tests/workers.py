"""Processes of their own for tests that share work between several, or kill one; quick to start.

One server per test session imports torch once and forks a process for each call.
"""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["orthrus.training.trainer", "orthrus.training.view_score", "tests.tiny"])


def start(function: Callable[..., None], *args: Any) -> BaseProcess:
    process = CONTEXT.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def run_together(function: Callable[..., None], number: int, store: Path, *args: Any) -> None:
    """Run `function(*args)` in that many processes of one gloo group, to the end."""
    processes = [start(_in_group, function, rank, number, str(store), args) for rank in range(number)]
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * number


def _in_group(
    function: Callable[..., None], rank: int, number: int, store: str, args: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(number), "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=number)
    try:
        function(*args)
    finally:
        dist.destroy_process_group()
