"""The cache: all of a folder or nothing, and one sentence when the disk is in the way."""

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from orthrus.base import cache_dir
from orthrus.base.storage import load_published, publish
from orthrus.errors import StorageError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path))
    return tmp_path


def fill(work: Path, out: Path) -> dict[str, Any]:
    (work / "scratch").write_text("x")
    (out / "weights.bin").write_bytes(b"12345")
    return {"file": "test"}


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock"))


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("ORTHRUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "orthrus"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "orthrus"


def test_published_once_and_verified(cache: Path) -> None:
    folder = publish("key", fill, needed_bytes=10)
    assert left_over(cache) == ["key"]
    assert load_published("key") == folder

    def never(work: Path, out: Path) -> dict[str, Any]:
        raise AssertionError("built twice")

    assert publish("key", never, needed_bytes=10) == folder


def test_files_are_read_once_and_again_when_touched(cache: Path) -> None:
    folder = publish("key", fill, needed_bytes=10)
    reads: list[str] = []

    def read(stage: str, *_: Any) -> None:
        reads.append(stage)

    load_published("key", read)
    assert len(reads) == 1
    load_published("key", read)
    assert len(reads) == 1
    (folder / "weights.bin").touch()
    load_published("key", read)
    load_published("key", read)
    assert len(reads) == 2


@pytest.mark.parametrize("checked", [False, True], ids=["new", "checked"])
@pytest.mark.parametrize("damage", ["changed", "changed, date kept", "truncated", "gone", "manifest"])
def test_a_damaged_folder_is_seen_and_built_again(cache: Path, damage: str, checked: bool) -> None:
    folder = publish("key", fill, needed_bytes=10)
    if checked:
        assert load_published("key") == folder
    before = (folder / "weights.bin").stat()
    if damage == "gone":
        (folder / "weights.bin").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "weights.bin").write_bytes(b"1" if damage == "truncated" else b"1234X")
    if damage == "changed, date kept":
        os.utime(folder / "weights.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_published("key") is None
    publish("key", fill, needed_bytes=10)
    assert load_published("key") == folder
    assert left_over(cache) == ["key"]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["oserror", "safetensors"],
)
def test_full_disk_names_path_and_need_and_leaves_nothing(cache: Path, failure: Exception) -> None:
    def run_full(work: Path, out: Path) -> dict[str, Any]:
        fill(work, out)
        raise failure

    with pytest.raises(StorageError, match=r"disk ran full .*models \(750 MB are needed\)"):
        publish("key", run_full, needed_bytes=750_000_000)
    assert left_over(cache) == []


def test_too_little_space_is_said_before_the_work(cache: Path) -> None:
    def never(work: Path, out: Path) -> dict[str, Any]:
        raise AssertionError("built without space")

    with pytest.raises(StorageError, match="MB are needed"):
        publish("key", never, needed_bytes=shutil.disk_usage(cache).total * 2)
    assert left_over(cache) == []


def test_unwritable_cache_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot be made"):
        publish("key", fill, needed_bytes=1)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("other")], ids=["ctrl-c", "other"])
def test_any_other_end_leaves_nothing_either(cache: Path, failure: BaseException) -> None:
    def stop(work: Path, out: Path) -> dict[str, Any]:
        fill(work, out)
        raise failure

    with pytest.raises(type(failure)):
        publish("key", stop, needed_bytes=1)
    assert left_over(cache) == []


def test_what_a_killed_process_left_is_swept(cache: Path) -> None:
    (cache / "models" / ".key.dead").mkdir(parents=True)
    publish("key", fill, needed_bytes=1)
    assert left_over(cache) == ["key"]


def test_two_at_once_build_once(cache: Path) -> None:
    builds: list[int] = []
    stages: list[str] = []

    def slow(work: Path, out: Path) -> dict[str, Any]:
        builds.append(1)
        time.sleep(0.3)
        return fill(work, out)

    def ask() -> None:
        publish("key", slow, needed_bytes=1, progress=lambda stage, _done, _total: stages.append(stage))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert any("waiting" in stage for stage in stages)
