"""The head of a GGUF file, checked against the file's own size before anything of its numbers is believed."""

import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthrus.errors import CorruptFileError

if TYPE_CHECKING:
    from gguf import GGUFReader

# The least that an entry can take: a tensor a name, a dimension, its type and offset; a field a key and a value.
_LEAST_TENSOR, _LEAST_FIELD = 8 + 4 + 8 + 4 + 8, 8 + 4 + 1
_LAYER = re.compile(r"blk\.(\d+)\.")
_CONTROL = 3
_END_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Control tokens that llama.cpp takes for ends, whatever the file's fields say.
_END_NAMES = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|eom_id|>", "<|endoftext|>",
    "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>",
    "<|endofturn|>", "<|turn_end|>", "<turn|>",
}  # fmt: skip


def check_counts(path: Path) -> None:
    """CorruptFileError for a file that says it holds more tensors or fields than fit into it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24:
        raise damaged(path)
    version, num_tensors, num_fields = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3):
        raise CorruptFileError(
            f"{path} is GGUF of version {version}, and versions 2 and 3 (little endian) can be read: use a newer "
            "file of the model."
        )
    if num_tensors * _LEAST_TENSOR + num_fields * _LEAST_FIELD > size:
        raise damaged(path)


def check_numbers(path: Path, reader: "GGUFReader") -> None:
    """CorruptFileError where the model that the fields describe is another than that of the tensors."""
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    layers = {int(match[1]) for name in shapes if (match := _LAYER.match(name)) is not None}
    widest = max((n for shape in shapes.values() for n in shape), default=0)
    arch = _content(reader, "general.architecture")
    stated = _content(reader, f"{arch}.block_count")
    if layers and stated != max(layers) + 1:
        raise CorruptFileError(
            f"{path.name} says that it has {stated} layers, but holds {max(layers) + 1}: use another file."
        )
    for key in ("embedding_length", "feed_forward_length", "vocab_size", "attention.head_count", "expert_count",
                "attention.head_count_kv", "attention.key_length", "attention.value_length",
                "rope.dimension_count", "expert_feed_forward_length"):  # fmt: skip
        value = _content(reader, f"{arch}.{key}")
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, int) and not 0 <= n <= widest for n in numbers):
            raise CorruptFileError(
                f"{path.name} says {arch}.{key} = {value}, but its widest tensor has {widest}: use another file."
            )


def end_token_ids(reader: "GGUFReader") -> tuple[int, ...]:
    """All tokens that end a text, as llama.cpp reads them: named by the fields, or control tokens by name."""
    found = {_content(reader, f"tokenizer.ggml.{field}") for field in _END_FIELDS}
    kinds, names = reader.fields.get("tokenizer.ggml.token_type"), reader.fields.get("tokenizer.ggml.tokens")
    if kinds is not None and names is not None:
        types: Sequence[Any] = kinds.contents()
        for token_id in (i for i, kind in enumerate(types) if kind == _CONTROL):
            if token_id < len(names.data) and names.contents(token_id) in _END_NAMES:
                found.add(token_id)
    return tuple(sorted(i for i in found if type(i) is int and i >= 0))


def damaged(path: Path) -> CorruptFileError:
    return CorruptFileError(f"{path} is truncated or damaged: download it again.")


def _content(reader: "GGUFReader", key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()
