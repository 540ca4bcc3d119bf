"""What a model name means, and the sentence for every name that means nothing."""

from pathlib import Path

import pytest

from orthrus.base import Source, resolve
from orthrus.errors import ModelNotFoundError, OrthrusError, UserInputError


def test_default_and_hub_ids_need_nothing_on_disk() -> None:
    assert resolve("default").kind == "default"
    assert resolve("Qwen/Qwen3-0.6B") == Source("hub", "Qwen/Qwen3-0.6B")
    assert resolve("Qwen/Qwen3-0.6B", "main").revision == "main"


def test_folder_and_gguf_file(tmp_path: Path) -> None:
    folder, file, bare = tmp_path / "m", tmp_path / "m.gguf", tmp_path / "no-suffix"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    file.write_bytes(b"anything")
    bare.write_bytes(b"GGUF....")
    assert resolve(str(folder)) == Source("folder", str(folder), folder)
    assert resolve(str(file)) == Source("gguf", str(file), file)
    assert resolve(str(bare)).kind == "gguf"


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-model", "a/b/c", "missing.gguf"])
def test_absent_paths_are_not_taken_for_hub_ids(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        resolve(name)


@pytest.mark.parametrize("name", ["", "  ", "smollm", "own er/name", "a--b/c", "a/b.git", "-a/b", "a/b!"])
def test_malformed_ids_are_refused(name: str) -> None:
    with pytest.raises(UserInputError):
        resolve(name)


def test_folder_without_config_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"x\.gguf"):
        resolve(str(tmp_path))


def test_other_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"12345678")
    with pytest.raises(UserInputError, match="no GGUF model"):
        resolve(str(file))


def test_revision_applies_to_hub_ids_only(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="revision"):
        resolve("default", "main")
    with pytest.raises(UserInputError, match="revision is empty"):
        resolve("a/b", " ")


def test_messages_are_one_line() -> None:
    for name in ("", "./nowhere", "smollm", "a/b/c"):
        with pytest.raises(OrthrusError) as caught:
            resolve(name)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(".")
