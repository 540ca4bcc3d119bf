"""Files and folders that the user asked for: whole or not at all, and never over what is not ours."""

import json
import os
import shutil
from pathlib import Path

import pytest

from orthrus.base import outputs
from orthrus.base.outputs import atomic_folder, check_report, check_writable, replace_file
from orthrus.errors import StorageError, UserInputError


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="exists already"), atomic_folder(tmp_path / "out") as scratch:  # noqa: PT012
        (scratch / "file").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("precious")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_a_broken_link_is_somebodys(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserInputError, match="exists already"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").is_symlink()


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


def test_a_folder_in_the_place_of_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(StorageError, match="cannot be written"), replace_file(tmp_path / "file"):
        pass
    assert (tmp_path / "file").is_dir()


def test_a_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    outputs.write_text_atomic(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("text", ["my notes", "{}", "[]", '{"kind": "shopping"}', "\xff", "[" * 99_999])
def test_a_file_that_is_no_report_is_not_replaced(tmp_path: Path, text: str) -> None:
    file = tmp_path / "out.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UserInputError, match="no report of Orthrus"):
        check_report(file)


def test_reports_of_ours_and_new_files_may_be_written(tmp_path: Path) -> None:
    file = tmp_path / "new" / "out.json"
    check_report(file)
    assert not file.parent.exists()
    file.parent.mkdir()
    file.write_text(json.dumps({"kind": "orthrus-bench"}))
    check_report(file)
    for device in ("/dev/null", str(tmp_path)):
        with pytest.raises(UserInputError, match="no report"):
            check_report(Path(device))


def test_what_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="is not a folder"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(StorageError, match="File name too long"):
        check_writable(tmp_path / ("x" * 300))
    with pytest.raises(StorageError, match="are needed; free some"):
        check_writable(tmp_path / "out", 1 << 60)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(StorageError, match=r"0\.0 MB free"):
        check_writable(tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", _denied)
    with pytest.raises(StorageError, match="Permission denied"):
        check_writable(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def _denied(**_: object) -> None:
    raise PermissionError(13, os.strerror(13))
