"""Compiled code in the cache folder: made once, kept with its digest, loaded only where it is ours and whole.

Code that is loaded runs as the user. So the folder is the user's alone (0700), each file belongs to the user,
nobody else may write it, and its sha256 lies beside it and is compared before the file is loaded. What fails
a check is not loaded: it is made anew and replaced in one step. Nothing is deleted because it did not load.

    compiled/NAME.so          the code, and NAME.so.sha256 as `sha256sum` writes it
    compiled/NAME.lock        held by the process that makes it; others wait
    compiled/build-*          where it is made; build-*.alive is locked for as long as its process lives
    compiled/sweep.lock       held for an instant, to make such a folder or to remove dead ones
"""

import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from orthrus.base.outputs import disk_problem
from orthrus.base.storage import Progress, cache_dir, make_cache_folder, sha256_file, storage_errors
from orthrus.errors import StorageError

if TYPE_CHECKING:
    from filelock import BaseFileLock

T = TypeVar("T")

NEEDED_BYTES = 100_000_000
"""Of disk while code is being made; what is kept takes a few MB."""
MOST_BYTES, MOST_DAYS = 1_000_000_000, 60
"""What is kept: the code used last, up to so many bytes, and none that nobody has used for so many days."""

_DAY_S = 86_400
_FULL_BYTES = 20_000_000
_OURS = re.compile(r"(kernels|layers)-[0-9a-f]{32}\.(so|lock)")
_PASSING = (
    "annot allocate memory",
    "ut of memory",
    "oo many open files",
    "nput/output error",
    "std::bad_alloc",
)


def kept_code(
    name: str, make: Callable[[Path], Path], load: Callable[[Path], T], progress: Progress | None = None
) -> T:
    """What `load` makes of the library of that name, which `make` writes somewhere into a folder it is given.

    It is made where it is missing, and anew where it fails its digest, is not the user's own, or the system's
    loader refuses it. However many processes and threads ask at once, one of them makes it and the others
    wait. progress: called only while code is made or waited for. Safe to call from several threads.

    Raises:
        StorageError: the cache folder cannot be written, belongs to somebody else, or the disk is full.
        Exception: what `make` raises; what `load` raises of code just made, or for want of memory.
    """
    folder = private_folder()
    path = folder / f"{name}.so"
    _sweep(folder)
    if (found := _loaded(path, load)) is not None:
        return found[0]
    with _held(folder / f"{name}.lock", progress):
        # Another process may have made it while this one waited.
        if (found := _loaded(path, load)) is not None:
            return found[0]
        if path.is_dir():
            raise StorageError(f"{path} is a folder where a file of compiled code belongs; remove it.")
        if progress is not None:
            progress("compiling for this processor (once, a minute or more)", 0, None)
        with _build_folder(folder) as build:
            _publish(_made(make, build), path)
        _evict(folder, keep=path)
    return load(path)


def private_folder() -> Path:
    """Where compiled code is kept: `compiled` in the cache folder, `compiled-UID` if that is another user's.

    It is made, with mode 0700. Raises StorageError where neither can be had.
    """
    shared = cache_dir() / "compiled"
    for folder in (shared, shared.with_name(f"compiled-{os.geteuid()}")):
        with storage_errors(folder, NEEDED_BYTES):
            make_cache_folder(folder, mode=0o700)
            if folder.stat().st_uid != os.geteuid():
                continue
            if folder.stat().st_mode & 0o077:
                with suppress(OSError):
                    # On a read-only disk others may look, but not write either.
                    folder.chmod(0o700)
        if folder.stat().st_mode & 0o022:
            raise StorageError(
                f"other users may write {folder}, and its permissions cannot be changed: point "
                "ORTHRUS_CACHE at a folder of yours."
            )
        return folder
    raise StorageError(
        f"{shared} belongs to another user, whose code is not run: point ORTHRUS_CACHE at a folder of yours."
    )


def is_sound(path: Path) -> bool:
    """Whether the library is a plain file of this user, which nobody else may write, as its digest says."""
    digest = _digest_file(path)
    try:
        if not _is_own(path) or not _is_own(digest):
            return False
        return digest.read_text(encoding="ascii") == _digest_line(path, path.name)
    except (OSError, ValueError):
        return False


def _is_own(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest_line(path: Path, name: str) -> str:
    return f"{sha256_file(path)}  {name}\n"


def _loaded(path: Path, load: Callable[[Path], T]) -> tuple[T] | None:
    """What `load` makes of a sound file; None where it must be made (anew)."""
    if not is_sound(path):
        return None
    try:
        found = load(path)
    except (OSError, ImportError, RuntimeError) as error:
        if any(text in str(error) for text in _PASSING):
            raise
        # As whole as it was made, and the loader refuses it: made for another system that shares the folder.
        return None
    with suppress(OSError):
        # Eviction goes by this date.
        if time.time() - path.stat().st_mtime > _DAY_S:
            os.utime(path)
    return (found,)


def _made(make: Callable[[Path], Path], build: Path) -> Path:
    """What `make` makes; StorageError, naming the disk, where one is full: compilers say so in many words."""
    _require_space(build)
    try:
        return make(build)
    except Exception as error:
        place, free = min(_free_bytes(build), key=lambda each: each[1])
        if isinstance(error, StorageError) or (disk_problem(error) != "full" and free > _FULL_BYTES):
            raise
        raise _no_space(build, place, free) from error


def _require_space(build: Path) -> None:
    free = shutil.disk_usage(build).free
    if free < NEEDED_BYTES:
        raise _no_space(build, build.parent, free)


def _no_space(build: Path, place: Path, free: int) -> StorageError:
    name = "ORTHRUS_CACHE" if place == build.parent else "TMPDIR"
    return StorageError(
        f"The disk is too full to compile code: {place} has {free / 1e6:,.0f} MB free, and about "
        f"{NEEDED_BYTES / 1e6:,.0f} MB are needed; free some space or point {name} at another disk."
    )


def _free_bytes(build: Path) -> list[tuple[Path, int]]:
    """The places that a compiler writes to, and what is free there."""
    places = [build.parent]
    with suppress(OSError):
        places.append(Path(tempfile.gettempdir()))
    return [(place, shutil.disk_usage(place).free) for place in places]


def _publish(made: Path, path: Path) -> None:
    """The code, then its digest; who reads between the two takes it for damaged, and waits at the lock."""
    digest = _digest_file(made)
    with storage_errors(path.parent, NEEDED_BYTES):
        digest.write_text(_digest_line(made, path.name), encoding="ascii")
        for file, target in ((made, path), (digest, _digest_file(path))):
            file.chmod(0o600)
            os.replace(file, target)


@contextmanager
def _held(path: Path, progress: Progress | None = None) -> Iterator[None]:
    lock = _lock(path)
    with storage_errors(path.parent, NEEDED_BYTES):
        if not _taken(lock):
            if progress is not None:
                progress("waiting for another process that compiles this code", 0, None)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _lock(path: Path) -> "BaseFileLock":
    from filelock import FileLock

    return FileLock(path, mode=0o600)


def _taken(lock: "BaseFileLock") -> bool:
    """Take a lock, if nobody holds it."""
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


@contextmanager
def _build_folder(folder: Path) -> Iterator[Path]:
    """A folder to make code in, which vanishes in the end; at the next start, where the process is killed."""
    with storage_errors(folder, NEEDED_BYTES), _held(folder / "sweep.lock"):
        # The marker first: no build folder is without one. The name that it takes is a new one.
        handle, name = tempfile.mkstemp(prefix="build-", suffix=".alive", dir=folder)
        os.close(handle)
        alive = _lock(Path(name))
        alive.acquire()
        build = Path(name).with_suffix("")
        build.mkdir(mode=0o700)
    try:
        yield build
    finally:
        _remove(build, Path(name))
        alive.release()


def _remove(build: Path, marker: Path) -> None:
    shutil.rmtree(build, ignore_errors=True)
    if not build.exists():
        # A compiler that outlives its killed parent may still be writing: the next sweep sees the marker.
        marker.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what builds have left whose process is gone. Nothing of it matters, so nothing of it fails."""
    with suppress(OSError):
        markers = [*folder.glob("build-*.alive")]
        sweep = _lock(folder / "sweep.lock")
        if not markers or not _taken(sweep):
            return
        try:
            for marker in markers:
                alive = _lock(marker)
                # Ended meanwhile, or alive.
                if not marker.exists() or not _taken(alive):
                    continue
                try:
                    _remove(marker.with_suffix(""), marker)
                finally:
                    alive.release()
        finally:
            sweep.release()


def _evict(folder: Path, keep: Path) -> None:
    """Delete code of ours that nobody has used for long, and the least used where there is too much."""
    with suppress(OSError):
        ours = {path: path.stat() for path in folder.iterdir() if _OURS.fullmatch(path.name)}
        ours.pop(keep, None)
        total, oldest = keep.stat().st_size, time.time() - MOST_DAYS * _DAY_S
        for path, found in sorted(ours.items(), key=lambda each: each[1].st_mtime, reverse=True):
            total += found.st_size
            if found.st_mtime < oldest or (path.suffix == ".so" and total > MOST_BYTES):
                path.unlink(missing_ok=True)
                _digest_file(path).unlink(missing_ok=True)
