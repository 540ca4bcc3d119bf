"""Measures a run's peak memory, and its energy if the machine counts it."""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
NOT_AVAILABLE = "not available"


def forget_peak(device: torch.device, process: Path = Path("/proc/self")) -> None:
    """From now on `peak_bytes` is that of what follows, where the system allows that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        (process / "clear_refs").write_text("5")


def peak_bytes(device: torch.device, process: Path = Path("/proc/self")) -> int | None:
    """Most memory since `forget_peak`: of PyTorch's allocator on a GPU, else of the process; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = (process / "status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Counter:
    """One energy counter: microjoules in a file, which starts again from 0 after `largest`."""

    name: str
    file: Path
    largest: int

    def read(self) -> int:
        return int(self.file.read_text())


class Energy:
    """Energy of whole processor packages and their memory, from the kernel's RAPL counters.

    `idle_watts`: what the machine takes doing nothing, measured for `idle_s` seconds when this is made. Without
    counters that can be read nothing is guessed: `counters` is empty, and every answer is None.
    """

    def __init__(self, root: Path = RAPL, idle_s: float = 10.0) -> None:
        self.counters = tuple(_counters(root))
        self.idle_watts: float | None = None
        if self.counters:
            before, start = self._read(), time.perf_counter()
            time.sleep(idle_s)
            self.idle_watts = self._joules(before) / (time.perf_counter() - start)
        self._before: list[int] = []
        self._start = 0.0

    def start(self) -> None:
        """The window begins."""
        self._before, self._start = self._read(), time.perf_counter()

    def stop(self) -> float | None:
        """Joules since `start` beyond the machine's idle ones; None without counters."""
        if not self.counters or self.idle_watts is None:
            return None
        seconds = time.perf_counter() - self._start
        return self._joules(self._before) - self.idle_watts * seconds

    def describe(self) -> dict[str, object]:
        """For the report: which counters, and what was taken off."""
        if not self.counters:
            return {"counters": NOT_AVAILABLE, "idle_watts": NOT_AVAILABLE}
        return {"counters": [c.name for c in self.counters], "idle_watts": self.idle_watts}

    def _read(self) -> list[int]:
        return [counter.read() for counter in self.counters]

    def _joules(self, before: list[int]) -> float:
        pairs = zip(self.counters, before, self._read(), strict=True)
        return sum((now - then) % (c.largest + 1) for c, then, now in pairs) / 1e6


def _counters(root: Path) -> list[Counter]:
    """Packages, and the memory of each; cores and graphics are parts of a package already."""
    found = []
    try:
        for folder in sorted(root.glob("*rapl:*")):
            name = (folder / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                counter = Counter(
                    f"{folder.name} ({name})",
                    folder / "energy_uj",
                    int((folder / "max_energy_range_uj").read_text()),
                )
                counter.read()
                found.append(counter)
    except (OSError, ValueError):
        # Readable by root alone on most systems.
        return []
    return found
