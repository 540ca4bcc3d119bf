"""Folders that a run writes again: only its own, only as it left them, and only one process at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orthrus.base.outputs import SCRATCH
from orthrus.base.owned import (
    LOCK,
    MARK,
    check_unlocked,
    locked_folder,
    replace_folder,
    restore_folder,
)
from orthrus.errors import StorageError, UserInputError


def build(target: Path, text: str, owner: str = "run") -> None:
    with replace_folder(target, owner) as temporary:
        (temporary / "file").write_text(text)


def found(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.name != MARK}


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    build(tmp_path / "out", "old")
    build(tmp_path / "out", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert found(tmp_path / "out") == {"file": "new"}


def _add(folder: Path) -> None:
    (folder / "mine").write_text("precious")


def _change(folder: Path) -> None:
    (folder / "file").write_text("edited")


def _unmark(folder: Path) -> None:
    (folder / MARK).unlink()


def _spoil(folder: Path) -> None:
    (folder / MARK).write_text("[]")


def _nest(folder: Path) -> None:
    (folder / "file").unlink()
    (folder / "file").mkdir()


def _link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def test_a_large_file_that_was_edited_in_its_size_is_not_replaced_and_a_copy_of_a_folder_is(
    tmp_path: Path,
) -> None:
    build(tmp_path / "out", "x" * (2 << 20))
    file = tmp_path / "out" / "file"
    # A copy has other times.
    os.utime(file, ns=(1, 1))
    build(tmp_path / "out", "y" * (2 << 20))
    file.write_text("z" * (2 << 20))
    with pytest.raises(UserInputError, match="file, which was changed after this run wrote it"):
        build(tmp_path / "out", "new")
    assert file.read_text()[0] == "z"


@pytest.mark.parametrize("change", [_add, _change, _unmark, _spoil, _nest, _link])
def test_what_somebody_changed_is_not_replaced(tmp_path: Path, change: Callable[[Path], None]) -> None:
    build(tmp_path / "out", "old")
    change(tmp_path / "out")
    names = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(UserInputError, match="move it away"):
        build(tmp_path / "out", "new")
    assert sorted(p.name for p in tmp_path.rglob("*")) == names


def test_another_runs_and_somebodys_folder_are_not_replaced(tmp_path: Path) -> None:
    build(tmp_path / "out", "old", "another")
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").touch()
    for name in ("out", "mine", "file"):
        with pytest.raises(UserInputError, match="move it away"):
            build(tmp_path / name, "new")
    assert found(tmp_path / "out") == {"file": "old"}


def test_what_appears_while_the_new_folder_is_made_stays(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="move it away"), replace_folder(tmp_path / "out", "run"):  # noqa: PT012
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("precious")
    assert found(tmp_path / "out") == {"mine": "precious"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    build(tmp_path / "out", "old")

    def fail() -> None:
        with replace_folder(tmp_path / "out", "run") as temporary:
            (temporary / "file").write_text("half")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert found(tmp_path / "out") == {"file": "old"}


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "out", "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == tmp_path / "out" and self.name != "out":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StorageError, match="disk ran full"):
        build(tmp_path / "out", "new")
    assert found(tmp_path / "out") == {"file": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_clearing_up_takes_only_what_is_ours(tmp_path: Path) -> None:
    for name in (".out.mine", ".out.old.x/out"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("precious")
    build(tmp_path / "out", "old")
    aside = tmp_path / f".out{SCRATCH}one"
    aside.mkdir()
    (tmp_path / "out").rename(aside / "out")
    (tmp_path / f".out{SCRATCH}two").mkdir()
    restore_folder(tmp_path / "out", "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.mine", ".out.old.x", "out"]
    assert found(tmp_path / "out") == {"file": "old"}
    assert (tmp_path / ".out.mine" / "file").read_text() == "precious"
    restore_folder(tmp_path / "absent" / "out", "run")


HOLD = """
import sys
from pathlib import Path
from orthrus.base.owned import locked_folder
with locked_folder(Path(sys.argv[1]), "works"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_holds_a_folder_and_the_other_is_told_which(tmp_path: Path) -> None:
    check_unlocked(tmp_path, "works")
    assert not list(tmp_path.iterdir())
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(UserInputError, match=f"process {holder.pid} on .* works in"):
                check_unlocked(tmp_path, "works")
        holder.kill()
    # The lock of a process that was killed is nobody's.
    with locked_folder(tmp_path, "works"):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(UserInputError, match=f"process {os.getpid()} "), locked_folder(tmp_path, "works"):
            pass
    assert (tmp_path / LOCK).read_text() == ""


def test_a_lock_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(StorageError), locked_folder(tmp_path, "works"):
        pass
