"""Folders that replace older ones, and full disks behind other errors."""

from pathlib import Path

import pytest

from orthrus.base.outputs import replace_file, replace_folder
from orthrus.errors import StorageError


def build(target: Path, text: str) -> None:
    with replace_folder(target) as temporary:
        (temporary / "file").write_text(text)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    build(tmp_path / "out", "old")
    (tmp_path / "out" / "more").touch()
    build(tmp_path / "out", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {"file": "new"}


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    build(tmp_path / "out", "old")

    def fail() -> None:
        with replace_folder(tmp_path / "out") as temporary:
            (temporary / "file").write_text("half")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


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
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_behind_another_error_is_recognised(tmp_path: Path) -> None:
    def fail() -> None:
        with replace_file(tmp_path / "file"):
            try:
                raise OSError(28, "No space left on device")
            except OSError:
                raise RuntimeError("unexpected position") from None

    with pytest.raises(StorageError, match="disk ran full"):
        fail()
    assert not list(tmp_path.iterdir())
