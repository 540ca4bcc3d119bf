"""Files and folders that the user asked for: written whole or not at all, and never over another."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orthrus.errors import StorageError, UserInputError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the body ends well, and vanishes when it does not.

    Raises UserInputError when `target` exists, StorageError when the disk is full or not writable.
    """
    if target.exists():
        raise UserInputError(f"{target} exists already; name a new folder or remove that one first.")
    with _built_folder(target) as scratch:
        yield scratch


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """As `atomic_folder`, but takes the place of an older `target`, which stays until the new is complete.

    Two renames: a reader sees the old folder, for an instant none, then the new one. For our outputs only.
    """
    with _built_folder(target) as scratch:
        yield scratch


def restore_folder(target: Path) -> None:
    """Clear up after a `replace_folder` whose process was killed; puts a folder that it moved aside back.

    Only where nobody else writes `target` at the same time.
    """
    if not target.exists():
        for old in target.parent.glob(f".{target.name}.old.*/{target.name}"):
            old.rename(target)
            break
    for scrap in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(scrap, ignore_errors=True)


@contextmanager
def _built_folder(target: Path) -> Iterator[Path]:
    with _storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with _storage_errors(target):
            yield scratch
            scratch.chmod(0o777 & ~_umask())
            # safetensors makes its files private; what was asked for should be as readable as any other file.
            for file in scratch.iterdir():
                file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
            _move_into_place(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move_into_place(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
        return
    # Beside the scratch folder, not in it: there the old one would move along.
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    try:
        scratch.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """A temporary file that replaces `target` in one step when the body ends well, and vanishes otherwise.

    Raises StorageError when the disk is full or not writable.
    """
    with _storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
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


@contextmanager
def _storage_errors(target: Path) -> Iterator[None]:
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
