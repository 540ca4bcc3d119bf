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


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the body ends well, and vanishes when it does not.

    Raises UserInputError when `target` exists, StorageError when the disk is full or not writable.
    """
    if target.exists():
        raise UserInputError(f"{target} exists already; name a new folder or remove that one first.")
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
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
        code = error.errno if isinstance(error, OSError) else None
        # safetensors reports a full disk through an exception of its own, as text only.
        if code in _FULL or "os error 28" in str(error):
            raise StorageError(
                f"the disk ran full while writing {target}; free some space and try again."
            ) from error
        if code in {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}:
            raise StorageError(
                f"{target} cannot be written ({os.strerror(code or 0)}); choose a place where you may write."
            ) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
