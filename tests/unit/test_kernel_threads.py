"""How many threads our kernels use beside other programs, by the test's own clock; and equal bits by any."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from orthrus.kernels.build import load_kernels
from orthrus.kernels.linear import fast_linear

MS = 1_000_000
LONG = 10 * MS
"""A wait that is reason enough by itself."""
USUAL = 8


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    load_kernels()


@pytest.fixture
def limit() -> Any:
    return torch.classes.orthrus.ThreadLimit()


def rises_after(limit: Any, now: int, usual: int = 2) -> int:
    """Milliseconds until a thread comes back, and it comes back at that moment."""
    threads = limit.threads(usual, now)
    for ms in range(1, 10_000):
        if limit.threads(usual, now + ms * MS) > threads:
            return ms
    raise AssertionError("no thread comes back")


def test_all_threads_until_one_is_late(limit: Any) -> None:
    assert limit.threads(USUAL, 0) == USUAL
    limit.waited(USUAL, LONG, 0)
    assert limit.threads(USUAL, 1) == USUAL - 1


def test_one_hiccup_costs_ten_milliseconds(limit: Any) -> None:
    limit.waited(2, LONG, 0)
    assert limit.threads(2, 9 * MS) == 1
    assert limit.threads(2, 10 * MS) == 2


def test_short_waits_take_no_thread_before_they_add_up(limit: Any) -> None:
    for now in range(0, 200, 10):
        limit.waited(2, 2 * MS, now * MS)
        assert limit.threads(2, now * MS) == 2
    threads = []
    for now in range(200, 220, 4):
        limit.waited(2, 3 * MS, now * MS)
        threads.append(limit.threads(2, now * MS))
    assert min(threads) == 1


def test_rare_hiccups_cost_no_more(limit: Any) -> None:
    now = 0
    for _ in range(20):
        limit.waited(2, LONG, now)
        assert rises_after(limit, now) == 10
        now += 1000 * MS


def test_a_lasting_neighbour_is_asked_less_and_less_often(limit: Any) -> None:
    now, pauses = 0, []
    for _ in range(10):
        limit.waited(2, LONG, now)
        pauses.append(rises_after(limit, now))
        # Late again, two milliseconds after it came back.
        now += (pauses[-1] + 2) * MS
    assert pauses == [10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000]


def test_many_neighbours_are_found_in_few_steps_and_threads_come_back_in_few(limit: Any) -> None:
    threads, steps = 64, 0
    while threads > 1:
        limit.waited(threads, LONG, steps * MS)
        threads, steps = limit.threads(64, steps * MS), steps + 1
    assert steps == 6
    now, rises = steps * MS, 0
    while threads < 64:
        now, rises = now + 1000 * MS, rises + 1
        threads = limit.threads(64, now)
    assert rises == 6


def test_never_fewer_than_one_nor_more_than_usual(limit: Any) -> None:
    for now in range(5):
        limit.waited(1, LONG, now)
    assert limit.threads(4, 10) == 1
    assert limit.threads(1, 10) == 1


def test_what_another_caller_has_said_counts_once(limit: Any) -> None:
    limit.waited(8, LONG, 0)
    limit.waited(8, LONG, 1)
    assert limit.threads(8, 2) == 7


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_equal_by_any_number_of_threads(dtype: torch.dtype) -> None:
    packed = fast_linear([nn.Linear(70, 200, dtype=dtype)])
    assert packed is not None
    x_TC = torch.randn(9, 70, dtype=dtype)
    found = []
    for num in (1, 2, 3, 5):
        torch.set_num_threads(num)
        found.append(packed(x_TC))
        # What a kernel uses for itself is its own business.
        assert torch.get_num_threads() == num
    assert all(torch.equal(found[0], each) for each in found)


SCRIPT = """
import time, torch
from torch import nn
from orthrus.kernels.build import load_kernels
from orthrus.kernels.linear import fast_linear
load_kernels()
torch.set_num_threads(8 * torch.get_num_threads())
packed, x_TC = fast_linear([nn.Linear(1024, 4096)]), torch.randn(8, 1024)
first, least = packed(x_TC), torch.get_num_threads()
until = time.monotonic() + 20
while least == torch.get_num_threads() and time.monotonic() < until:
    assert torch.equal(packed(x_TC), first)
    least = min(least, torch.ops.orthrus.num_threads())
print(least < torch.get_num_threads())
"""


def test_more_threads_than_cores_are_found_to_be_too_many() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("True"), done.stderr
