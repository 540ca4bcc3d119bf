"""What is left to a process: the machine's memory, or what control groups of either version leave of it."""

from pathlib import Path

import pytest

from orthrus.base import memory
from orthrus.base.memory import available_bytes

MB = 1_000_000


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:
        available = 8000 * MB

    monkeypatch.setattr(memory.psutil, "virtual_memory", Machine)


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def version_2(root: Path, path: str, top: str = "/") -> None:
    write(root, "proc/self/cgroup", f"0::{path}\n")
    write(root, "proc/self/mountinfo", f"30 23 0:26 {top} /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n")


def group(root: Path, folder: str, limit: str, used: int, files: int = 0) -> None:
    write(root, f"sys/fs/cgroup/{folder}/memory.max", f"{limit}\n")
    write(root, f"sys/fs/cgroup/{folder}/memory.current", f"{used}\n")
    write(root, f"sys/fs/cgroup/{folder}/memory.stat", f"anon 5\ninactive_file {files}\n")


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) == 8000 * MB


def test_a_container_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    version_2(tmp_path, "/")
    group(tmp_path, "", str(1000 * MB), 700 * MB, files=200 * MB)
    assert available_bytes(tmp_path) == 500 * MB


def test_groups_around_it_count_too(tmp_path: Path) -> None:
    version_2(tmp_path, "/user.slice/job.service")
    group(tmp_path, "user.slice", str(2000 * MB), 1900 * MB)
    group(tmp_path, "user.slice/job.service", "max", 100 * MB)
    assert available_bytes(tmp_path) == 100 * MB
    group(tmp_path, "user.slice/job.service", str(120 * MB), 90 * MB)
    assert available_bytes(tmp_path) == 30 * MB


def test_a_path_of_the_host_in_a_container(tmp_path: Path) -> None:
    version_2(tmp_path, "/docker/abc", top="/docker/abc")
    group(tmp_path, "", str(300 * MB), 100 * MB)
    assert available_bytes(tmp_path) == 200 * MB
    version_2(tmp_path, "/docker/abc", top="/elsewhere")
    assert available_bytes(tmp_path) == 200 * MB


def test_version_1(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/\n")
    write(
        tmp_path,
        "proc/self/mountinfo",
        "31 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        "32 24 0:28 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
    )
    folder = "sys/fs/cgroup/memory"
    write(tmp_path, f"{folder}/memory.limit_in_bytes", f"{600 * MB}\n")
    write(tmp_path, f"{folder}/memory.usage_in_bytes", f"{500 * MB}\n")
    write(tmp_path, f"{folder}/memory.stat", f"inactive_file 1\ntotal_inactive_file {50 * MB}\n")
    assert available_bytes(tmp_path) == 150 * MB
    # What version 1 says where there is no limit.
    write(tmp_path, f"{folder}/memory.limit_in_bytes", "9223372036854771712\n")
    assert available_bytes(tmp_path) == 8000 * MB


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    version_2(tmp_path, "/")
    group(tmp_path, "", str(100 * MB), 120 * MB)
    assert available_bytes(tmp_path) == 0


@pytest.mark.parametrize("text", ["", "no such format\n", "0\n", "0::\n", "\n\n1:2\n"])
def test_files_of_another_form_say_nothing(tmp_path: Path, text: str) -> None:
    version_2(tmp_path, "/")
    for name in ("proc/self/cgroup", "proc/self/mountinfo", "sys/fs/cgroup/memory.max"):
        write(tmp_path, name, text)
        assert available_bytes(tmp_path) >= 0


def test_this_machine_has_some() -> None:
    assert available_bytes() > 0
