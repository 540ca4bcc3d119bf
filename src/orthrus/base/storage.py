"""The cache folder: finished, checksummed folders of converted models, and nothing half-written.

A folder is built in a private work folder beside its final place and published with one rename, so a
reader sees all of it or none. `manifest.json` inside records where the files came from and their sha256.
They are read and compared once, and again whenever a file has been touched since.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orthrus.base.json_text import parse_json
from orthrus.base.outputs import disk_problem, json_or_none, write_text_atomic
from orthrus.base.provenance import installed_version
from orthrus.errors import StorageError

Progress = Callable[[str, int, int | None], None]
"""Called as `progress(stage, done, total)`. done and total count bytes; total is None where nothing is counted."""

MANIFEST, CHECKED = "manifest.json", "checked.json"
_PACKAGES = ("orthrus-lm", "torch", "transformers", "gguf", "safetensors")


def cache_dir() -> Path:
    """Where converted models and compiled code live: ORTHRUS_CACHE, else XDG_CACHE_HOME/orthrus, else
    ~/.cache/orthrus.

    Raises StorageError where `~` is nobody's home.
    """
    own = os.environ.get("ORTHRUS_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser().absolute()
        return (Path(shared).expanduser() if shared else Path.home() / ".cache").absolute() / "orthrus"
    except RuntimeError as error:
        raise StorageError(
            f"the cache folder has no place ({error}): point ORTHRUS_CACHE at a folder of yours."
        ) from error


def sha256_file(path: Path, progress: Progress | None = None, stage: str = "checking") -> str:
    """Hex sha256 of a file's bytes."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(stage, done, total)
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, links as such; files that vanish meanwhile count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total


@contextmanager
def storage_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a full or unwritable disk into one sentence that names the place and the need.

    Raises:
        StorageError: the body ran out of space or could not write below `path`.
    """
    try:
        yield
    except Exception as error:
        problem = disk_problem(error)
        if problem == "full":
            raise StorageError(
                f"The disk ran full while writing {path} ({_mb(needed_bytes)} are needed): free some space "
                "or point ORTHRUS_CACHE at another disk."
            ) from error
        if problem is not None:
            raise StorageError(
                f"{path} cannot be written ({problem}): fix its permissions or point "
                "ORTHRUS_CACHE at a folder of yours."
            ) from error
        raise


def make_cache_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder of the cache. Raises StorageError where it cannot be one, and OSError where it is not allowed."""
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        raise StorageError(
            f"{folder} cannot be made ({os.strerror(error.errno or 0)}: something else is in the way, or the place "
            "takes no folders): point ORTHRUS_CACHE at a folder of yours."
        ) from error


def load_published(key: str, progress: Progress | None = None) -> Path | None:
    """The finished folder of that key; None if it is absent or damaged.

    Checksums are verified, unless they have been since the files were last touched.
    """
    folder = _models_dir() / key
    try:
        manifest = parse_json((folder / MANIFEST).read_text())
        files: dict[str, dict[str, Any]] = manifest["files"]
        marks = [_mark(folder / name) for name in files]
        if marks == json_or_none(folder / CHECKED):
            return folder
        for name, entry in files.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return None
            if sha256_file(path, progress, "checking the cached model") != entry["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with suppress(StorageError, OSError):
        # In a cache that belongs to somebody else every start checks anew.
        write_text_atomic(folder / CHECKED, json.dumps(marks) + "\n")
    return folder


def _mark(path: Path) -> list[int]:
    """What changes with a file: not even a tool that sets back its date can keep all of it."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def publish(
    key: str,
    build: Callable[[Path, Path], dict[str, Any]],
    *,
    needed_bytes: int,
    progress: Progress | None = None,
) -> Path:
    """Build a folder once, however many processes ask for it at the same time.

    `build(work, out)` fills `out` and may use `work` for scratch; both are removed if it fails. The
    dictionary that it returns becomes the manifest's `source`.

    Returns:
        The published folder.

    Raises:
        StorageError: too little space (checked before and during the build), or no write access.
    """
    from filelock import FileLock, Timeout

    models, target = _models_dir(), _models_dir() / key
    with storage_errors(models, needed_bytes):
        make_cache_folder(models)
        lock = FileLock(models / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress is not None:
                progress("waiting for another process that prepares this model", 0, None)
            lock.acquire()
        try:
            if (ready := load_published(key, progress)) is not None:
                return ready
            # We hold the lock, so work folders of this key belong to a process that was killed.
            for stale in models.glob(f".{key}.*"):
                shutil.rmtree(stale, ignore_errors=True)
            _require_space(models, needed_bytes)
            _build_and_rename(build, models, target)
        finally:
            lock.release()
    return target


def _build_and_rename(build: Callable[[Path, Path], dict[str, Any]], models: Path, target: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=models))
    try:
        work, out = scratch / "work", scratch / "out"
        work.mkdir()
        out.mkdir()
        source = build(work, out)
        for path in out.iterdir():
            # safetensors writes files for the owner only; a cache may be shared.
            path.chmod(path.stat().st_mode | (out.stat().st_mode & 0o444))
        files = {
            path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            for path in sorted(out.iterdir())
        }
        versions = {name: found for name in _PACKAGES if (found := installed_version(name)) is not None}
        manifest = {"format": 1, "source": source, "versions": versions, "files": files}
        (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if target.exists():
            # Only a damaged folder gets here: a sound one was returned before the build.
            target.rename(scratch / "damaged")
        out.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _models_dir() -> Path:
    return cache_dir() / "models"


def _require_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageError(
            f"{folder} has {_mb(free)} free, but {_mb(needed_bytes)} are needed: free some space or point "
            "ORTHRUS_CACHE at another disk."
        )


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
