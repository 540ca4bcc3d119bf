"""Files and folders that the user asked for: written whole or not at all, and never over what is not ours."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orthrus.base.json_text import parse_json
from orthrus.errors import StorageError, UserInputError

# Part of the name of everything temporary: clearing up after a killed process takes nothing else.
SCRATCH = ".orthrus-scratch-"
REPORT_KINDS = "orthrus-"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EILSEQ,
}


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the body ends well, and vanishes when it does not.

    Raises UserInputError when `target` exists, before the body or after it; StorageError when the disk is
    full or not writable.
    """
    check_absent(target)
    with scratch_folder(target) as scratch:
        yield scratch
        make_readable(scratch)
        # The body may take minutes, in which somebody else may have made one.
        check_absent(target)
        scratch.rename(target)


def check_absent(target: Path) -> None:
    """UserInputError when there is anything of that name, a broken link included."""
    if os.path.lexists(target):
        raise UserInputError(f"{target} exists already; name a new folder or remove that one first.")


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, removed at the end unless it was renamed; StorageError as above."""
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}{SCRATCH}", dir=target.parent))
    try:
        with storage_errors(target):
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def make_readable(scratch: Path) -> None:
    """safetensors makes its files private; what was asked for should be as readable as any other file."""
    scratch.chmod(0o777 & ~_umask())
    for file in scratch.iterdir():
        file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())


@contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """A temporary file that replaces `target` in one step when the body ends well, and vanishes otherwise.

    A link stays, and what it points to is replaced. Only for files that are ours: see `check_report`. Raises
    StorageError when the disk is full or not writable.
    """
    with storage_errors(target):
        target = target.resolve() if target.is_symlink() else target
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}{SCRATCH}", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def write_text_atomic(target: Path, text: str) -> None:
    """Replace `target` with `text` in one step; a reader sees the old file or the new one."""
    with replace_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_report(target: Path) -> None:
    """Make sure, before any work, that a report can be written to `target`.

    Raises UserInputError when it is there and no JSON report of ours (an object whose `kind` begins with
    `orthrus-`), StorageError when its folder cannot be written.
    """
    if os.path.lexists(target) and not _is_report(target):
        raise UserInputError(f"{target} exists already and is no report of Orthrus; name a new file.")
    check_writable(target.parent)


def json_or_none(file: Path) -> Any:
    """What a JSON file holds; None if it is missing, unreadable or damaged."""
    try:
        return parse_json(file.read_bytes()) if file.is_file() else None
    except (OSError, ValueError):
        return None


def _is_report(file: Path) -> bool:
    content = json_or_none(file)
    return isinstance(content, dict) and str(content.get("kind")).startswith(REPORT_KINDS)


def check_writable(folder: Path, needed_bytes: int = 1) -> None:
    """Make sure, before any work, that `folder` can be made and written to; leaves nothing behind.

    Raises StorageError when it cannot, or when its disk has less than `needed_bytes` free.
    """
    with storage_errors(folder):
        place = _nearest(folder.absolute())
        if not place.is_dir():
            raise StorageError(f"{folder} cannot be made: {place} is not a folder; name another place.")
        try:
            with tempfile.TemporaryFile(prefix=SCRATCH, dir=place) as probe:
                probe.write(b"\0")
                probe.flush()
            free = shutil.disk_usage(place).free
        except FileNotFoundError as error:
            # What some file systems of the kernel say of every new file.
            raise StorageError(f"{folder} cannot be written; choose a place where you may write.") from error
    if free < needed_bytes:
        raise StorageError(
            f"the disk of {folder} has {_size(free)} free, and {_size(needed_bytes)} are needed; free some "
            "space or name another place."
        )


def _nearest(path: Path) -> Path:
    """The path itself or the first folder above it that is there; OSError for a name that cannot be."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return _nearest(path.parent)
    return path


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """StorageError instead of what the system raises when `target` cannot be written or the disk is full."""
    try:
        yield
    except Exception as error:
        problem = disk_problem(error)
        if problem == "full":
            raise StorageError(
                f"the disk ran full while writing {target}; free some space and try again."
            ) from error
        if problem is not None:
            raise StorageError(
                f"{target} cannot be written ({problem}); choose a place where you may write."
            ) from error
        raise


def disk_problem(error: Exception) -> str | None:
    """What an error says about the disk: "full", the system's words for no access, or nothing."""
    if isinstance(error, StorageError):
        # Said already, by a body of our own.
        return None
    code = error.errno if isinstance(error, OSError) else None
    # safetensors and pip report a full disk as text only, torch as what its own error came after.
    behind = getattr(error.__context__, "errno", None)
    if {code, behind} & _FULL or any(text in str(error) for text in ("os error 28", "No space left")):
        return "full"
    return os.strerror(code) if code is not None and code in _DENIED else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
