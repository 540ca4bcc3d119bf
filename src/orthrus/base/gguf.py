"""GGUF files: unpack the quantised weights once, cache them as an ordinary model folder.

transformers can keep GGUF blocks packed, but then needs its own kernels and refuses to save. We want plain
tensors whose rows can be split between two views, so each file is dequantised once and kept under its sha256.
"""

import gc
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orthrus.base.gguf_header import check_counts, check_numbers, damaged, end_token_ids
from orthrus.base.json_text import parse_json
from orthrus.base.quiet import quiet_libraries
from orthrus.base.storage import MANIFEST, Progress, load_published, publish, sha256_file
from orthrus.errors import CorruptFileError, MissingExtraError, OrthrusError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType
    from transformers import PreTrainedTokenizerBase

# llama.cpp's "smollm" cuts every digit off before the GPT-2 split; transformers 5.23 does not know it.
_SINGLE_DIGIT_SPLITS = {"smollm"}
TOKENIZER_BYTES = 32_000_000


def cache_key(sha256: str) -> str:
    """Name of the cached folder of a GGUF file with that checksum."""
    return f"gguf2-{sha256[:32]}"


def ensure_folder(path: Path, progress: Progress | None = None) -> Path:
    """The cached model folder of a GGUF file, built on first use.

    Raises:
        CorruptFileError: not a GGUF file, truncated, or inconsistent.
        UnsupportedModelError: an architecture or tensor type that transformers cannot read.
        StorageError: too little space for the unpacked weights.
    """
    _check_magic(path)
    sha256 = sha256_file(path, progress, "checking the GGUF file")
    key = cache_key(sha256)
    if (folder := load_published(key, progress)) is not None:
        return folder
    facts = inspect(path)

    def build(_work: Path, out: Path) -> dict[str, Any]:
        convert(path, out, facts, progress=progress)
        return {"file": path.name, "sha256": sha256, "quantised": list(facts.quantised)}

    return publish(key, build, needed_bytes=facts.num_bytes, progress=progress)


def unpacked_types(folder: Path) -> str | None:
    """How the weights of a cached model folder were quantised in their file; None where they were not."""
    try:
        types = parse_json((folder / MANIFEST).read_text())["source"]["quantised"]
    except (OSError, ValueError, KeyError, TypeError):
        # A folder of an earlier release.
        return "GGUF, unpacked"
    return f"GGUF {', '.join(types)}, unpacked" if types else None


def convert(
    path: Path,
    out: Path,
    facts: "GgufFacts",
    *,
    name: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write `path` as safetensors, config, generation config and tokenizer into the folder `out`.

    Quantised files unpack to float32: a 4-bit weight is scale * code + offset with float16 scale and
    offset, and bfloat16 would change four of five such weights, float16 every second one.

    Raises:
        CorruptFileError, UnsupportedModelError: as `ensure_folder`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if progress is not None:
        progress("unpacking the GGUF weights", 0, None)
    location: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        # transformers draws this bar on stderr without asking its own switch for bars.
        with quiet_libraries(), redirect_stderr(StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **location)
            # With output_loading_info this returns a pair, which its annotation does not say.
            pair: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                quantization_config=GgufConfig(dequantize=True),
                dtype=facts.dtype,
                output_loading_info=True,
                **location,
            )
    except MemoryError:
        raise
    except Exception as error:
        raise _reading_failed(path, error) from error
    model, missing = pair[0], sorted(pair[1]["missing_keys"])
    if missing:
        raise CorruptFileError(
            f"{path.name} lacks {len(missing)} tensors, {missing[0]} first: use another file."
        )
    model.config._name_or_path = name or path.stem
    # The file's own title lands in the config under a name that nothing reads.
    model.config.__dict__.pop("_model_name_or_path", None)
    tokenizer.model_max_length = model.config.max_position_embeddings
    if facts.splitting in _SINGLE_DIGIT_SPLITS:
        _split_single_digits(tokenizer)
    ends = [i for i in facts.end_token_ids if i < model.config.vocab_size]
    if ends:
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    # The weights are plain tensors now; these two left-overs make save_pretrained refuse.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.__dict__.pop("hf_quantizer", None)
    if progress is not None:
        progress("saving the unpacked weights", 0, None)
    with quiet_libraries():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    # Hundreds of MB that the caller is about to need for the model it loads.
    del model, pair
    gc.collect()


class GgufFacts(NamedTuple):
    """What has to be known of a file before it is unpacked."""

    dtype: "torch.dtype"
    """The narrowest dtype that loses nothing of the file's weights."""
    num_bytes: int
    """Disk space that the unpacked folder takes."""
    splitting: str
    """llama.cpp's name for how text is cut before byte-pair merging."""
    quantised: tuple[str, ...] = ()
    """The file's quantised types, such as Q4_K."""
    end_token_ids: tuple[int, ...] = ()
    """All tokens that end a text."""


def inspect(path: Path) -> GgufFacts:
    """Read a file's header and tensor table.

    Raises:
        CorruptFileError: not a GGUF file, truncated, inconsistent, or without weights.
        UnsupportedModelError: a tensor type that nothing here can unpack.
    """
    import torch
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFReader

    _check_magic(path)
    check_counts(path)
    try:
        reader = GGUFReader(path)
        check_numbers(path, reader)
        kinds = {tensor.tensor_type for tensor in reader.tensors}
        num_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
        field = reader.fields.get("tokenizer.ggml.pre")
        splitting = "" if field is None else str(field.contents())
        ends = end_token_ids(reader)
    except OrthrusError:
        raise
    except Exception as error:
        # The reader indexes into the mapped file, so a truncated one fails in many ways.
        raise damaged(path) from error
    if not kinds:
        raise CorruptFileError(
            f"{path} holds no weights (a vocabulary-only file?): choose a full model file."
        )
    if unknown := sorted(kind.name for kind in kinds - _readable_types()):
        raise UnsupportedModelError(
            f"{path.name} stores weights as {unknown[0]}, which transformers cannot unpack: use a file in "
            "another type, such as Q4_K_M, Q8_0 or BF16, or a safetensors upload."
        )
    dtype = torch.float32
    # Half-precision files keep their norms in float32, but those came from the same half-precision model.
    if kinds <= {Kind.F32, Kind.F16, Kind.BF16} and kinds != {Kind.F32}:
        dtype = torch.bfloat16 if Kind.BF16 in kinds else torch.float16
    quantised = sorted(kind.name for kind in kinds - {Kind.F32, Kind.F16, Kind.BF16})
    num_bytes = num_weights * dtype.itemsize + TOKENIZER_BYTES
    return GgufFacts(dtype, num_bytes, splitting, tuple(quantised), ends)


def _readable_types() -> "set[GGMLQuantizationType]":
    """What the gguf package unpacks, and transformers through it; it keeps one class for each type."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    readable = set()
    for kind in GGMLQuantizationType:
        _, num_bytes = GGML_QUANT_SIZES[kind]
        try:
            with np.errstate(all="ignore"):
                dequantize(np.zeros((1, num_bytes), dtype=np.uint8), kind)
        except NotImplementedError:
            continue
        readable.add(kind)
    return readable


def _split_single_digits(tokenizer: "PreTrainedTokenizerBase") -> None:
    from tokenizers import pre_tokenizers

    backend: Any = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read ({error.strerror}): check the file.") from error
    if magic != b"GGUF":
        raise CorruptFileError(
            f"{path} is not a GGUF file (it does not start with 'GGUF'): download it again."
        )


def _reading_failed(path: Path, error: Exception) -> OrthrusError:
    text = str(error)
    if isinstance(error, ImportError) or "pip install" in text:
        return MissingExtraError(
            "Reading GGUF files needs two more packages; run `pip install gguf accelerate`."
        )
    reason = (text.strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
    if "not supported" in text or "architecture" in text or "Cannot build a tokenizer" in text:
        return UnsupportedModelError(f"{path.name} cannot be unpacked ({reason}): use a safetensors upload.")
    return CorruptFileError(f"{path.name} cannot be unpacked ({reason}): download it again.")
