"""Where a number comes from: what every report and checkpoint stores beside its figures."""

import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import gettempdir
from typing import Any

PACKAGES = ("orthrus-lm", "torch", "transformers", "safetensors", "numpy")


def provenance(*, device: str, dtype: str, seed: int | None) -> dict[str, Any]:
    """Command line, commit, versions, machine and settings of this run, as JSON-ready values.

    `git_commit` is None outside a checkout; `git_dirty`: whether there are uncommitted changes. `time` is UTC.
    """
    import torch

    commit, dirty = git_state()
    return {
        "command": command_line(),
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": {name: installed_version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "accelerator": _accelerator(device),
        "threads": torch.get_num_threads(),
        "device": device,
        "dtype": dtype.removeprefix("torch."),
        "seed": seed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """What was typed, without folders that mean something on this machine alone.

    An absolute path within the current folder is written from there, any other by its last part.
    """
    return shlex.join([Path(sys.argv[0]).name, *map(_portable, sys.argv[1:])])


# Where a path may begin and end: in a list, behind a key, in quotes, behind a short option. Not in an address.
_PATH = re.compile(r"""(?:(?<![^\s,\[="':#])|(?<=^-[a-zA-Z]))/(?!/)[^\s,\]"']+""")


def _portable(argument: str) -> str:
    key, equals, value = argument.partition("=")
    for before, path in (("", argument), (key + equals, value)):
        # A name may hold blanks, and so may a prompt that begins with a slash.
        if path.startswith("/") and (" " not in path or _is_told(path)):
            return before + _without_folder(path)
    is_prose = " " in argument and "[" not in argument

    def shown(found: re.Match[str]) -> str:
        return found[0] if is_prose and not _is_private(found[0]) else _without_folder(found[0])

    return _PATH.sub(shown, argument)


def _is_told(path: str) -> bool:
    """Whether it can only be meant as a path: it lies in a folder of somebody's own, or is there."""
    try:
        return _is_private(path) or Path(path).exists()
    except OSError:
        return False


def _is_private(path: str) -> bool:
    """Whether a path lies in a folder of somebody's own."""
    homes = (Path.home(), Path.cwd(), Path(gettempdir()), Path("/home"), Path("/Users"), Path("/root"))
    return any(Path(path).is_relative_to(home) for home in homes if home != Path("/"))


def _without_folder(path: str) -> str:
    """An absolute path from here on, or its last part alone. What has but one part names no folder."""
    here = Path.cwd()
    if Path(path).is_relative_to(here):
        return str(Path(path).relative_to(here))
    return Path(path).name if len(Path(path).parts) > 2 else path


def git_state(package: Path = Path(__file__).parents[1]) -> tuple[str | None, bool | None]:
    """(commit, dirty) of the checkout that `package` runs from; (None, None) when it is installed.

    An environment may lie inside somebody else's repository: only a checkout with this very package counts.
    Results that were just measured do not make it dirty.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or (Path(top) / "src" / package.name).resolve() != package.resolve():
        return None, None
    status = _git(package, "status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    return _git(package, "rev-parse", "--verify", "HEAD"), None if status is None else bool(status)


def cpu_model() -> str:
    """The processor's name, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def processor() -> tuple[Any, ...]:
    """System, name and instructions: what code that is made for this processor depends on."""
    import torch

    # Not there in older releases of PyTorch.
    ask = getattr(torch.cpu, "get_capabilities", None)
    instructions = {} if ask is None else ask()
    capability = torch.backends.cpu.get_cpu_capability()
    return sys.platform, platform.machine(), cpu_model(), capability, sorted(instructions.items())


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def installed_version(package: str) -> str | None:
    """The version of an installed distribution; None when it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _accelerator(device: str) -> str | None:
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return str(torch.cuda.get_device_name(device))
    return None if kind == "cpu" else kind
