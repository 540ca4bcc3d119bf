"""Folders that a run of ours writes again and again: it knows them by a mark, and touches nothing else.

The mark is a file in the folder that names the owner and each file it wrote. A folder without it, with
another owner's, with a file more or with a file that was changed is the user's.
"""

import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orthrus.base.json_text import parse_json
from orthrus.base.outputs import SCRATCH, make_readable, scratch_folder, storage_errors
from orthrus.errors import StorageError, UserInputError

MARK = ".orthrus-owner.json"
LOCK = ".orthrus.lock"
# A larger file with the size and time that it was written with is not read again, because weights of gigabytes are
# checked often.
_READ_BYTES = 1 << 20


@contextmanager
def replace_folder(target: Path, owner: str) -> Iterator[Path]:
    """As `atomic_folder`, but takes the place of an older `target` of the same owner, which stays until then.

    Two renames: a reader sees the old folder, for an instant none, then the new one. Raises UserInputError as
    `check_owned`, before the body and after it.
    """
    check_owned(target, owner)
    with scratch_folder(target) as scratch:
        yield scratch
        files = {file.name: _stamp(file) for file in scratch.iterdir()}
        mark_folder(scratch, owner, files)
        make_readable(scratch)
        check_owned(target, owner)
        _move_into_place(scratch, target)


def mark_folder(folder: Path, owner: str, files: dict[str, str] | None = None) -> None:
    """Write the owner's mark into a folder, with the stamps of its files where `foreign` is to check them."""
    content = {"owner": owner, "files": files or {}}
    (folder / MARK).write_text(json.dumps(content) + "\n", encoding="utf-8")


def marked_files(folder: Path, owner: str) -> dict[str, str] | None:
    """The files that the mark in a folder lists; None where there is no mark, or another owner's."""
    try:
        mark = parse_json((folder / MARK).read_bytes())
        files = mark["files"] if mark["owner"] == owner else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return files if isinstance(files, dict) else None


def _move_into_place(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
        return
    # Beside the scratch folder, not in it: there the old one would move along.
    with scratch_folder(target) as aside:
        target.rename(aside / target.name)
        try:
            scratch.rename(target)
        except OSError:
            (aside / target.name).rename(target)
            raise


def restore_folder(target: Path, owner: str) -> None:
    """Clear up after a `replace_folder` whose process was killed; puts a folder that it moved aside back.

    Only where nobody else writes `target` at the same time: see `locked_folder`.
    """
    for scrap in scraps_of(target):
        old = scrap / target.name
        if foreign(old, owner) is not None:
            continue
        if old.is_dir() and not os.path.lexists(target):
            old.rename(target)
        shutil.rmtree(scrap, ignore_errors=True)


def scraps_of(target: Path) -> list[Path]:
    """What a killed process left beside `target` of its temporary files and folders."""
    if not target.parent.is_dir():
        return []
    return sorted(p for p in target.parent.iterdir() if p.name.startswith(f".{target.name}{SCRATCH}"))


def check_owned(target: Path, owner: str) -> None:
    """UserInputError when `target` exists and holds anything that `owner` did not write."""
    if (reason := foreign(target, owner)) is not None:
        raise UserInputError(f"{target} {reason}; move it away, or give another output folder.")


def foreign(target: Path, owner: str) -> str | None:
    """Why `target` is not this owner's to replace; None when it is, or is not there."""
    if not os.path.lexists(target):
        return None
    if target.is_symlink() or not target.is_dir():
        return "is in the way of a folder of that name"
    known = marked_files(target, owner)
    if known is None:
        return "was not written by this run"
    for file in target.iterdir():
        if file.name == MARK:
            continue
        if file.name not in known or file.is_symlink() or not file.is_file():
            return f"holds {file.name}, which this run did not write"
        if not _is_unchanged(file, str(known[file.name])):
            return f"holds {file.name}, which was changed after this run wrote it"
    return None


def _stamp(file: Path) -> str:
    """Digest, size and time of a file."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return f"sha256:{digest}{_size_and_time(file)}"


def _size_and_time(file: Path) -> str:
    status = file.stat()
    return f":{status.st_size}:{status.st_mtime_ns}"


def _is_unchanged(file: Path, stamp: str) -> bool:
    """Whether a file has the content that it had when `_stamp` was called. A copy has another time."""
    if file.stat().st_size > _READ_BYTES and stamp.endswith(_size_and_time(file)):
        return True
    return _stamp(file).rpartition(":")[0] == stamp.rpartition(":")[0]


@contextmanager
def locked_folder(folder: Path, doing: str, *, wait: bool = False) -> Iterator[None]:
    """Hold `folder`, which must exist, for this process alone; `doing` says for what, as in "trains".

    wait: until another process that holds it lets it go. Else raises UserInputError naming that process; in any
    case StorageError when the lock cannot be written.
    """
    with _locked(folder / LOCK, f"{doing} in {folder}", "output folder", wait=wait):
        yield


@contextmanager
def locked_file(target: Path, doing: str) -> Iterator[None]:
    """As `locked_folder`, for a file in a folder that exists. The lock is a hidden file beside it.

    A link has the lock of the file that it leads to.
    """
    file = Path(os.path.realpath(target))
    with _locked(file.with_name(f".{file.name}{LOCK}"), f"{doing} {target}", "output file"):
        yield


@contextmanager
def _locked(file: Path, doing: str, what: str, *, wait: bool = False) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        with storage_errors(file):
            lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise UserInputError(
            f"{_holder(file)} {doing}; wait for it, stop it, or give another {what}."
        ) from error
    except (NotImplementedError, OSError) as error:
        raise StorageError(
            f"{file} cannot be locked ({error}); choose a folder on a disk with file locks."
        ) from error
    try:
        # Written in place: a file that takes the place of this one would not be locked.
        with storage_errors(file):
            file.write_text(json.dumps(_this_process()) + "\n", encoding="utf-8")
        yield
    finally:
        # Empty again: whoever reads it later would look for a process that is gone.
        with suppress(OSError):
            file.write_text("", encoding="utf-8")
        lock.release()


def check_unlocked(folder: Path, doing: str) -> None:
    """UserInputError when another process holds `folder` at this moment; makes nothing."""
    if (folder / LOCK).is_file():
        with locked_folder(folder, doing):
            pass


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "program": Path(sys.argv[0]).name,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _holder(file: Path) -> str:
    try:
        held = parse_json(file.read_bytes())
        return f"process {int(held['pid'])} on {held['host']!s:.100} (since {held['since']!s:.30})"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
