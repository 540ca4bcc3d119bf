"""Memory that is left to this process: what the machine has, and what its container or service may use."""

from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")


def available_bytes(root: Path = _ROOT) -> int:
    """Bytes that can still be allocated: the machine's, or fewer where a control group (v1, v2) says so.

    Pages of files that a group holds without using them count as free, as the system gives them up first.
    root: where `proc` and `sys` are looked for.
    """
    return min([int(psutil.virtual_memory().available), *_left_to_groups(root)])


def _left_to_groups(root: Path) -> Iterator[int]:
    """What each limited group that this process is in, and each one around it, may still use."""
    for folder, version in _groups(root):
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used = (_number(folder / name) for name in names[:2])
        if limit is not None and used is not None:
            yield max(0, limit - max(0, used - _statistic(folder / "memory.stat", names[2])))


def _groups(root: Path) -> Iterator[tuple[Path, int]]:
    """(folder, version) of this process's memory group, and of all around it that can be seen from here."""
    paths: dict[int, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        # number:controllers:path, controllers empty in version 2.
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        version = {"cgroup2": 2, "cgroup": 1}.get(kind[0])
        if version not in paths or (version == 1 and "memory" not in kind[2].split(",")):
            continue
        top = root / fields[4].lstrip("/")
        # A container may see its own group as the top, and yet get the group's path on the host.
        inside = Path("/" + paths[version].lstrip("/"))
        own, parts = Path(fields[3]), tuple[str, ...]()
        if own == Path("/") or own in (inside, *inside.parents):
            parts = inside.relative_to(own).parts
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth]), version


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """A count of bytes; None for "max", and where there is none."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _statistic(path: Path, name: str) -> int:
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0
