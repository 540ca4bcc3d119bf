"""Compiled code in the cache: loaded only if it is ours and whole, made once, and nothing left behind."""

import errno
import os
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.workers import start

from orthrus.base import compiled_files
from orthrus.base.compiled_files import is_sound, kept_code, private_folder
from orthrus.errors import StorageError

NAME = "layers-" + "0" * 32


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path))
    return tmp_path / "compiled"


class Maker:
    """Makes "good" code, and counts how often."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, build: Path) -> Path:
        self.made += 1
        (build / "scratch.o").write_text("x")
        (build / "code").write_text("good")
        return build / "code"


def read(path: Path) -> str:
    text = path.read_text()
    assert text == "good", "foreign or damaged code was loaded"
    return text


def kept(make: Callable[[Path], Path], name: str = NAME) -> str:
    return kept_code(name, make, read)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


KEPT = [f"{NAME}.so", f"{NAME}.so.sha256"]


def test_code_is_made_once_and_is_the_users_alone(folder: Path) -> None:
    make = Maker()
    before = os.umask(0)
    try:
        assert kept(make) == kept(make) == "good"
    finally:
        os.umask(before)
    assert make.made == 1
    assert names(folder) == KEPT
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def changed(path: Path) -> None:
    path.write_text("evil")


def truncated(path: Path) -> None:
    path.write_text("goo")


def emptied(path: Path) -> None:
    path.write_text("")


def writable_by_all(path: Path) -> None:
    path.chmod(0o666)


def writable_by_group(path: Path) -> None:
    path.chmod(0o620)


def a_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def without_digest(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").unlink()


def with_digest_of_another(path: Path) -> None:
    """Whole, but code of another name: somebody has swapped them."""
    digest = path.with_name(f"{path.name}.sha256")
    digest.write_text(digest.read_text().replace(NAME, "layers-" + "1" * 32))


def with_digest_that_is_no_text(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").write_bytes(b"\xff\x00")


def with_digest_writable_by_all(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").chmod(0o666)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def of_another_user(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(path, 65534, 65534)


def with_digest_of_another_user(path: Path) -> None:
    of_another_user(path.with_name(f"{path.name}.sha256"))


FAULTS = [
    *(changed, truncated, emptied, writable_by_all, writable_by_group, a_link, without_digest, a_pipe),
    *(with_digest_of_another, with_digest_that_is_no_text, with_digest_writable_by_all),
    *(of_another_user, with_digest_of_another_user),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_code_that_fails_a_check_is_made_anew_and_never_loaded(
    folder: Path, fault: Callable[[Path], None]
) -> None:
    make = Maker()
    kept(make)
    fault(folder / f"{NAME}.so")
    assert not is_sound(folder / f"{NAME}.so")
    assert kept(make) == kept(make) == "good"
    assert make.made == 2
    assert names(folder) == KEPT
    assert is_sound(folder / f"{NAME}.so")


def test_a_folder_that_others_could_write_is_closed(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    (folder / f"{NAME}.so").write_text("evil")
    kept(Maker())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_closed_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    with pytest.raises(StorageError, match="other users may write"):
        kept(Maker())


def test_in_the_folder_of_another_user_nothing_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(Maker())
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(StorageError, match=r"belongs to another user.*ORTHRUS_CACHE"):
        # That of its own is not its own either, as the files that this test makes are not.
        private_folder()
    monkeypatch.undo()
    if os.geteuid() == 0:
        monkeypatch.setenv("ORTHRUS_CACHE", str(folder.parent))
        os.chown(folder, 65534, 65534)
        make = Maker()
        assert kept(make) == "good"
        assert make.made == 1
        assert names(folder.parent / "compiled-0") == KEPT


@pytest.mark.parametrize("place", ["cache", "cache/compiled"])
def test_a_file_in_place_of_the_folder_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("")
    with pytest.raises(StorageError, match=r"ORTHRUS_CACHE"):
        kept(Maker())
    assert (tmp_path / place).read_text() == ""


def test_a_folder_in_place_of_the_file_is_one_sentence(folder: Path) -> None:
    (folder / f"{NAME}.so").mkdir(parents=True)
    with pytest.raises(StorageError, match="is a folder"):
        kept(Maker())


def test_an_unwritable_cache_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StorageError, match=r"compiled cannot be written \(Permission denied\)"):
        kept(Maker())


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("C++ compile error\n/tmp/x.s: fatal error: error writing: No space left on device"),
    ],
    ids=["written", "compiler"],
)
def test_a_disk_that_runs_full_while_compiling_is_named(folder: Path, failure: Exception) -> None:
    def full(build: Path) -> Path:
        (build / "half").write_text("x")
        raise failure

    with pytest.raises(StorageError, match=r"too full to compile code: /.* has .* MB free"):
        kept(full)
    assert names(folder) == []


def test_a_full_disk_that_the_linker_dies_of_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ld maps its output: a full disk is a bus error to it."""
    usage = namedtuple("usage", "total used free")
    free = [500_000_000, 3_000_000, 500_000_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, free.pop(0)))

    def dies(build: Path) -> Path:
        raise RuntimeError("collect2: fatal error: ld terminated with signal 7 [Bus error]")

    with pytest.raises(StorageError, match=rf"{folder} has 3 MB free.*ORTHRUS_CACHE"):
        kept(dies)


def test_too_little_disk_is_said_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_files, "NEEDED_BYTES", shutil.disk_usage(folder.parent).total * 2)
    make = Maker()
    with pytest.raises(StorageError, match="are needed"):
        kept(make)
    assert make.made == 0
    assert names(folder) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("refused")], ids=["ctrl-c", "refused"])
def test_a_build_that_fails_leaves_nothing(folder: Path, failure: BaseException) -> None:
    def fail(build: Path) -> Path:
        (build / "half").write_text("x")
        raise failure

    with pytest.raises(type(failure)):
        kept(fail)
    assert names(folder) == []
    assert kept(Maker()) == "good"


def test_code_that_the_loader_refuses_is_made_anew(folder: Path) -> None:
    """Whole, but of another system's libraries, say."""
    make = Maker()

    def load(path: Path) -> str:
        if make.made < 2:
            raise OSError("version `GLIBC_2.99' not found")
        return read(path)

    kept(make)
    assert kept_code(NAME, make, load) == "good"
    assert make.made == 2


def test_a_passing_fault_while_loading_deletes_and_makes_nothing(folder: Path) -> None:
    make = Maker()
    kept(make)
    before = (folder / f"{NAME}.so").stat()
    for text in ("failed to map segment: Cannot allocate memory", "Too many open files"):

        def load(_: Path, text: str = text) -> str:
            raise OSError(text)

        with pytest.raises(OSError, match=text):
            kept_code(NAME, make, load)
    assert make.made == 1
    assert (folder / f"{NAME}.so").stat().st_ino == before.st_ino


def test_where_making_anew_fails_the_old_code_stays(folder: Path) -> None:
    kept(Maker())

    def refuse(_: Path) -> str:
        raise OSError("libgomp.so.1: cannot open shared object file")

    def fail(_: Path) -> Path:
        raise ValueError("no compiler")

    with pytest.raises(ValueError, match="no compiler"):
        kept_code(NAME, fail, refuse)
    assert is_sound(folder / f"{NAME}.so")


def test_a_bad_tmpdir_does_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    make = Maker()
    assert kept(make) == kept(make) == "good"
    assert make.made == 1


def _slowly(cache: Path, counter: Path) -> None:
    os.environ["ORTHRUS_CACHE"] = str(cache)

    def make(build: Path) -> Path:
        with counter.open("a") as file:
            file.write("made\n")
        time.sleep(0.5)
        return Maker()(build)

    kept(make)


def test_processes_that_ask_at_once_make_it_once(folder: Path) -> None:
    counter = folder.parent / "counter"
    processes = [start(_slowly, folder.parent, counter) for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.read_text() == "made\n"
    assert names(folder) == KEPT


def test_threads_that_ask_at_once_make_it_once_and_say_that_they_wait(folder: Path) -> None:
    stages: list[str] = []
    make = Maker()

    def slow(build: Path) -> Path:
        time.sleep(0.3)
        return make(build)

    def ask() -> None:
        kept_code(NAME, slow, read, lambda stage, _done, total: stages.append(f"{stage} {total}"))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert make.made == 1
    assert sorted({stage.split()[0] for stage in stages}) == ["compiling", "waiting"]
    assert all(stage.endswith("None") for stage in stages)
    stages.clear()
    ask()
    assert stages == []


def _hang(cache: Path, ready: Path, name: str) -> None:
    os.environ["ORTHRUS_CACHE"] = str(cache)

    def make(build: Path) -> Path:
        (build / "half").write_text("x")
        ready.write_text("")
        time.sleep(60)
        raise AssertionError("was to be killed")

    kept(make, name)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_build_leaves_goes_at_the_next_start(folder: Path, number: signal.Signals) -> None:
    """Also when that start builds nothing, and never while the build lives."""
    make = Maker()
    kept(make)
    ready, other = folder.parent / "ready", "layers-" + "2" * 32
    process = start(_hang, folder.parent, ready, other)
    while not ready.exists():
        time.sleep(0.01)
    kept(make)
    assert len([*folder.glob("build-*/half")]) == 1
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert len([*folder.glob("build-*/half")]) == 1
    kept(make)
    assert names(folder) == KEPT
    assert make.made == 1
    # Nor does its lock hold anybody up.
    kept(make, other)


def test_only_our_own_leftovers_are_swept(folder: Path) -> None:
    (folder / "build-mine").mkdir(parents=True)
    (folder / "build-mine" / "notes").write_text("x")
    kept(Maker())
    assert (folder / "build-mine" / "notes").read_text() == "x"


def test_code_that_nobody_uses_goes_in_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Maker()
    others = [f"layers-{digit * 32}" for digit in "345"]
    for name in others:
        kept(make, name)
    (folder / "layers-mine.so").write_text("x")
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    # Used: so it stays.
    kept(make, others[0])
    assert make.made == 3
    kept(make)
    left = [f"{name}{end}" for name in (NAME, others[0]) for end in (".so", ".so.sha256")]
    assert names(folder) == sorted([*left, "layers-mine.so"])
    monkeypatch.setattr(compiled_files, "MOST_BYTES", 9)
    os.utime(folder / f"{NAME}.so", (time.time() - 5, time.time() - 5))
    os.utime(folder / f"{others[0]}.so", (time.time() - 9, time.time() - 9))
    kept(make, others[1])
    assert names(folder) == sorted([*KEPT, f"{others[1]}.so", f"{others[1]}.so.sha256", "layers-mine.so"])
