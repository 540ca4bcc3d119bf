"""Loading a folder, and the sentence for every way in which a folder or an argument is wrong."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import huggingface_hub.errors
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from orthrus.base import Base, hub, load_base
from orthrus.base.loading import eos_token_ids
from orthrus.errors import (
    CorruptFileError,
    ModelNotFoundError,
    StorageError,
    UnsupportedModelError,
    UserInputError,
)

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)
WORDS = ["<unk>", "<s>", "</s>", "user", "assistant", "hello", "world"]


def tiny_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def save_tiny(folder: Path, dtype: torch.dtype = torch.bfloat16, **shards: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, **shards)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_a_frozen_base(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = load_base(str(folder), device="cpu")
    assert (base.name, base.family.name, base.context_length) == ("tiny", "Llama", 64)
    assert base.model.dtype == torch.float32
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.bfloat16),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype(folder: Path, asked: str | torch.dtype | None, expected: torch.dtype) -> None:
    assert load_base(str(folder), device="cpu", dtype=asked).model.dtype == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "bfloat1"}, "did you mean 'bfloat16'"),
        ({"dtype": "int8"}, "use one of float32, bfloat16, float16, auto"),
        ({"dtype": torch.int8}, "no dtype for a model"),
        ({"dtype": ""}, "no dtype"),
        ({"device": "gpu"}, "no device"),
        ({"device": "meta"}, "not supported"),
        ({"device": "cuda:99"}, "cannot be used"),
        ({"attn_implementation": "flash_attention_2"}, "takes no custom attention mask"),
        ({"attn_implementation": "spda"}, "use one of 'eager', 'sdpa', 'flex_attention'"),
        ({"revision": "main"}, "revision"),
    ],
)
def test_wrong_arguments(folder: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserInputError, match=words) as caught:
        load_base(str(folder), **arguments)
    assert "\n" not in str(caught.value)


def test_attention_choice_reaches_the_model(folder: Path) -> None:
    assert load_base(str(folder), device="cpu").model.config._attn_implementation == "sdpa"
    eager = load_base(str(folder), device="cpu", attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"


def test_hub_id_while_offline() -> None:
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE") as caught:
        load_base("no-such-owner/no-such-model", revision="v1", device="cpu")
    assert "no-such-owner/no-such-model at revision 'v1'" in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    # The unknown token's id alone would prove nothing.
    backend = Tokenizer(models.WordLevel({"<unk>": 50, "quick": 40}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    with pytest.raises(
        CorruptFileError, match="gives token id 40, but the model knows 0 to 6: they are of different"
    ):
        load_base(str(folder), device="cpu")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(CorruptFileError, match=f"lacks 1 of {len(shards)} weight files, {shards[1].name}"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("content", [b"", b"noise" * 50, None], ids=["empty", "noise", "truncated"])
def test_broken_safetensors(folder: Path, content: bytes | None) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000] if content is None else content)
    with pytest.raises(CorruptFileError, match="cannot be read") as caught:
        load_base(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_absent_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="no weights"):
        load_base(str(folder), device="cpu")


def test_missing_tensors_are_not_replaced_by_noise(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=3, layer_types=...)
    with pytest.raises(CorruptFileError, match=r"lack layers: they hold 2, and config\.json says 3"):
        load_base(str(folder), device="cpu")


def test_tensors_of_another_shape(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=56)
    with pytest.raises(CorruptFileError):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_broken_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"config\.json"):
        load_base(str(folder), device="cpu")


def test_unknown_and_unsupported_types(folder: Path) -> None:
    edit(folder / "config.json", model_type="nosuchnet")
    with pytest.raises(
        UnsupportedModelError, match="'nosuchnet', which this transformers version does not know"
    ):
        load_base(str(folder), device="cpu")
    edit(folder / "config.json", model_type="gpt2", layer_types=...)
    with pytest.raises(UnsupportedModelError, match="'gpt2' are not supported"):
        load_base(str(folder), device="cpu")


def test_missing_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CorruptFileError, match="tokenizer"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("declared", "expected"), [([1, 0], {0, 1}), (0, {0}), (5, {5}), ([], {2}), (None, {2})]
)
def test_eos_from_generation_config(folder: Path, declared: Any, expected: set[int]) -> None:
    edit(folder / "generation_config.json", eos_token_id=declared)
    assert load_base(str(folder), device="cpu").eos_token_ids == expected


def test_eos_without_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert load_base(str(folder), device="cpu").eos_token_ids == {2}


def test_eos_from_tokenizer_or_nowhere() -> None:
    bare: Any = SimpleNamespace(config=SimpleNamespace(eos_token_id=None), generation_config=None)
    with_eos: Any = SimpleNamespace(eos_token_id=7)
    without: Any = SimpleNamespace(eos_token_id=None)
    assert eos_token_ids(bare, with_eos) == {7}
    assert eos_token_ids(bare, without) == frozenset()


# ------------------------------------------------------------------------------------------ prompts


@pytest.fixture
def base(folder: Path) -> Base:
    return load_base(str(folder), device="cpu")


def test_prompts_through_the_template(base: Base) -> None:
    as_text = base.encode_prompt("hello world")
    assert as_text == [3, 5, 6, 4]
    assert base.encode_prompt([{"role": "user", "content": "hello world"}]) == as_text
    assert base.encode_prompt("hello world", raw=True) == [1, 5, 6]


def test_prompts_without_a_template(base: Base) -> None:
    base.tokenizer.chat_template = None
    assert base.encode_prompt("hello") == [1, 5]
    with pytest.raises(UserInputError, match="no chat template"):
        base.encode_prompt([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ([], "empty"),
        ([{"role": "user"}], "no 'content'"),
        ([{"content": "hello"}], "no 'role'"),
        ([{"role": "", "content": "hello"}], "empty role"),
        ([{"role": "user", "content": " "}], "last message is empty"),
        ([{"role": "user", "content": None}], "must be text or a list of text parts, not None"),
        (["hello"], "no dictionary"),
        ([{"role": "system", "content": "hello"}], "template refuses .*No system role"),
    ],
)
def test_prompts_that_cannot_be_answered(base: Base, prompt: Any, words: str) -> None:
    with pytest.raises(UserInputError, match=words):
        base.encode_prompt(prompt)


def test_raw_takes_text_only(base: Base) -> None:
    with pytest.raises(UserInputError, match="raw=True"):
        base.encode_prompt([{"role": "user", "content": "hello"}], raw=True)
    with pytest.raises(UserInputError, match="empty"):
        base.encode_prompt("  ", raw=True)


# -------------------------------------------------------------------------------------------- hub


class _Response:
    status_code = 404
    headers: ClassVar[dict[str, str]] = {}
    request = None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("GatedRepoError", "is gated: accept its terms"),
        ("RepositoryNotFoundError", "has no model a/b that you may see"),
        ("RevisionNotFoundError", "no revision 'v1'"),
        ("LocalEntryNotFoundError", "not complete in the local cache"),
        ("OfflineModeIsEnabled", "not complete in the local cache"),
        ("HFValidationError", "not a valid hub id"),
        ("XetDownloadError", "failed"),
    ],
)
def test_hub_errors_become_sentences(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    kind = getattr(huggingface_hub.errors, name)

    def fail(*_args: Any, **_kwargs: Any) -> str:
        http = issubclass(kind, huggingface_hub.errors.HfHubHTTPError)
        raise (
            kind("first line\nsecond line", response=_Response()) if http else kind("first line\nsecond line")
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises((ModelNotFoundError, UserInputError), match=words) as caught:
        hub.fetch("a/b", "v1")
    assert "\n" not in str(caught.value)


def test_full_disk_while_downloading_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(StorageError, match="disk ran full"):
        hub.fetch("a/b")


def test_hub_bytes_reach_the_callback(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The client makes several bars and a pool map from the class it is given; only one counts."""
    seen: list[tuple[str, int, int | None]] = []

    def download(*_args: Any, tqdm_class: Any, **_kwargs: Any) -> str:
        transfer = tqdm_class(unit="B", total=0, name="huggingface_hub.snapshot_download.transfer")
        written = tqdm_class(unit="B", total=0, name="huggingface_hub.snapshot_download")
        written.total = (written.total or 0) + 10
        written.refresh()
        transfer.update(3)
        written.update(4)
        written.update(6)
        assert list(tqdm_class(iter([1, 2]), desc="files", total=2)) == [1, 2]
        written.set_description("done")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.fetch("a/b", progress=lambda *call: seen.append(call)) == folder
    assert seen == [("downloading a/b", 4, 10), ("downloading a/b", 10, 10)]
