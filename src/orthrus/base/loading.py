"""Load the frozen base model, its tokenizer and everything the engine has to know about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthrus.base import default_model, gguf, hub
from orthrus.base.devices import check_attention, pick_device, pick_dtype, refuse_foreign_code
from orthrus.base.families import Family, check_layers, context_length, find_family, supported_families
from orthrus.base.json_text import parse_json
from orthrus.base.prompt import Message, encode_prompt
from orthrus.base.quantised import cannot_run, check_installed, check_runs, quantisation
from orthrus.base.quiet import quiet_libraries
from orthrus.base.resolve import Source, resolve
from orthrus.base.storage import Progress
from orthrus.base.text import printable
from orthrus.base.weights import Extra, check_all_used, check_finite, check_sizes, shapes_in, weight_files
from orthrus.errors import (
    CorruptFileError,
    ModelNotFoundError,
    OrthrusError,
    UnsupportedModelError,
    UserInputError,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Base:
    """A frozen model in eval mode with its tokenizer.

    `eos_token_ids` end a text (all of them; id 0 is a valid one; empty if the model declares none).
    `context_length` is in tokens: prompt, answer and draft positions have to stay below it. `quantised` names
    how the weights are or, in a GGUF file, were quantised; None for others.
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    eos_token_ids: frozenset[int]
    context_length: int
    family: Family
    source: Source
    quantised: str | None = None

    @property
    def reference(self) -> str:
        """What loads this base again: "default", a hub id or a whole path."""
        if self.source.kind in ("folder", "gguf"):
            return str(Path(self.source.origin).expanduser().resolve())
        return "default" if self.source.kind == "default" else self.source.origin

    def encode_prompt(
        self,
        prompt: str | Sequence[Message],
        *,
        raw: bool = False,
        template_values: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of text or messages; see `orthrus.base.prompt.encode_prompt`.

        Raises:
            UserInputError: nothing to continue, malformed messages, or messages without a template.
        """
        return encode_prompt(self.tokenizer, prompt, raw=raw, template_values=template_values, tools=tools)


def load_base(
    model: str | Source = "default",
    *,
    revision: str | None = None,
    dtype: "str | torch.dtype | None" = None,
    device: str | None = None,
    attn_implementation: str | None = None,
    config: "PreTrainedConfig | None" = None,
    extra: Extra | None = None,
    on_progress: Progress | None = None,
) -> Base:
    """Find, fetch where needed, check and load a base model.

    Args:
        model: "default", a folder, a .gguf file, or a hub id `owner/name`; or what `resolve` made of it, with
            the folder filled in where it has been fetched already.
        revision: branch, tag or commit of a hub id.
        dtype: "float32", "bfloat16", "float16", "auto" (the checkpoint's own) or a torch dtype. None means
            the checkpoint's own on an accelerator and float32 on a CPU. Of a quantised model it is the dtype
            of all that is not quantised, and of what goes from layer to layer.
        device: such as "cpu", "cuda", "cuda:1", "mps"; None picks the first accelerator, else the CPU.
        attn_implementation: "eager", "sdpa" or "flex_attention"; None leaves the stock model's choice.
        config: the base's config where the folder's own config.json holds something else around it.
        extra: says which tensors in the folder's files are not the base's.
        on_progress: called with (stage, done, total), in bytes, while something is fetched or unpacked.

    Raises:
        UserInputError: a wrong argument.
        ModelNotFoundError: no such model, or it cannot be reached.
        UnsupportedModelError: a family or layer that cannot carry a second view, or a quantisation that does
            not run here.
        MissingExtraError: a quantisation whose package is not installed.
        CorruptFileError: missing, truncated or altered files, weights that are no finite numbers, a config
            that does not fit the weights (found before memory of its sizes is asked for).
        StorageError: the disk is full or not writable.
    """
    picked_device = pick_device(device)
    check_attention(attn_implementation, picked_device)
    picked_dtype = pick_dtype(dtype, picked_device)
    source, folder, name = _locate(
        model if isinstance(model, Source) else resolve(model, revision), on_progress
    )
    config = config or read_config(folder, name)
    family = find_family(config)
    method = quantisation(config)
    if method is not None:
        check_installed(method, name)
    if on_progress is not None:
        on_progress(f"loading {name}", 0, None)
    shapes = shapes_in(folder, extra)
    check_sizes(config, shapes, name, packed=method is not None)
    loaded, unexpected = _read_weights(folder, name, config, picked_dtype, picked_device, attn_implementation)
    if method is None:
        check_all_used(unexpected, name, extra)
    check_finite(loaded, shapes, name)
    check_attention(getattr(loaded.config, "_attn_implementation", None), picked_device)
    check_layers(loaded, family)
    tokenizer = _read_tokenizer(folder, name)
    _check_vocabulary(tokenizer, int(loaded.get_input_embeddings().weight.shape[0]), name)  # type: ignore[index]
    loaded.requires_grad_(False)
    loaded.eval()
    # Quantised models are placed while they load, and refuse to be moved.
    if method is None:
        _place(loaded, picked_device)
    else:
        check_runs(loaded, method, name)
    return Base(
        name=name,
        model=loaded,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids(loaded, tokenizer),
        context_length=context_length(config),
        family=family,
        source=source,
        quantised=gguf.unpacked_types(folder) if source.kind == "gguf" else method,
    )


def eos_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """All token ids that end a text: what `generation_config` lists, else the config, else the tokenizer."""
    candidates = (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    for declared in candidates:
        ids = [declared] if isinstance(declared, int) else list(declared or ())
        if ids:
            return frozenset(int(token_id) for token_id in ids)
    return frozenset()


def _locate(source: Source, progress: Progress | None) -> tuple[Source, Path, str]:
    """The source with its path filled in, the folder to load, and the name to show."""
    if source.kind == "default":
        folder, origin = default_model.ensure_folder(progress)
        return Source("default", origin, folder), folder, f"default ({default_model.NAME})"
    if source.kind == "hub":
        folder = source.path or hub.fetch(source.origin, source.revision, progress=progress)
        return Source("hub", source.origin, folder, source.revision), folder, source.origin
    if source.path is None:
        raise ModelNotFoundError(f"{source.origin} has no path: resolve it first.")
    folder = gguf.ensure_folder(source.path, progress) if source.kind == "gguf" else source.path
    return source, folder, printable(source.path.name or str(source.path))


def read_config(folder: Path, name: str) -> "PreTrainedConfig":
    """The config of a model folder; CorruptFileError or UnsupportedModelError as in `load_base`."""
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        declared = parse_json(path.read_text(encoding="utf-8"))
        model_type = declared["model_type"]
        if not isinstance(model_type, str):
            raise TypeError("model_type is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is no readable model config: fetch the model again.") from error
    refuse_foreign_code(declared, name)
    try:
        with quiet_libraries():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        if model_type in _known_model_types():
            raise CorruptFileError(
                f"{path} is no valid config ({_reason(error)}): fetch the model again."
            ) from error
        raise UnsupportedModelError(
            f"{name} is of type '{model_type}', which this transformers version does not know: choose one of "
            f"{supported_families()}."
        ) from error
    return config


def config_from(fields: Any, name: str) -> "PreTrainedConfig":
    """The base's config that lies inside a merged folder's.

    Raises CorruptFileError when it is none, UnsupportedModelError when it asks for code from a hub.
    """
    from transformers import AutoConfig

    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise CorruptFileError(f"config.json of {name} holds no base_config: fetch the folder again.")
    refuse_foreign_code(fields, name)
    try:
        with quiet_libraries():
            config: PreTrainedConfig = AutoConfig.for_model(**fields)
    except Exception as error:
        raise CorruptFileError(
            f"the base_config in config.json of {name} is no valid config ({_reason(error)}): fetch the folder "
            "again."
        ) from error
    return config


def _known_model_types() -> set[str]:
    from transformers import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())


def _read_weights(
    folder: Path,
    name: str,
    config: "PreTrainedConfig",
    dtype: "torch.dtype | None",
    device: str,
    attn_implementation: str | None,
) -> "tuple[PreTrainedModel, list[str]]":
    """The model, and the names of tensors in its files that it has no place for."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"config": config, "dtype": "auto" if dtype is None else dtype}
    method = quantisation(config)
    if method is not None:
        options["device_map"] = {"": device}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with quiet_libraries():
            # With output_loading_info this returns a pair, which its annotation does not say.
            pair: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except MemoryError as error:
        raise UserInputError(f"{name} does not fit into memory: choose a smaller model or dtype.") from error
    except Exception as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise UserInputError(
                f"{name} does not fit into memory: choose a smaller model or dtype."
            ) from error
        raise _weights_failed(folder, name, method, error) from error
    # transformers only logs a missing tensor and carries on with random numbers in its place.
    loaded: PreTrainedModel = pair[0]
    missing = sorted(pair[1]["missing_keys"])
    if missing:
        raise CorruptFileError(
            f"The weights of {name} lack {len(missing)} tensors, {missing[0]} first: fetch the model again."
        )
    return loaded, sorted(pair[1]["unexpected_keys"])


def _weights_failed(folder: Path, name: str, method: str | None, error: Exception) -> OrthrusError:
    from safetensors import SafetensorError

    if not weight_files(folder):
        return CorruptFileError(
            f"{folder} holds a config but no weights in safetensors files: fetch model.safetensors too, or write "
            "it with transformers' save_pretrained."
        )
    if method is not None and not isinstance(error, SafetensorError):
        return cannot_run(method, name, error)
    if isinstance(error, ImportError) or "pip install" in str(error):
        return UnsupportedModelError(f"{name} needs a package that is not installed ({_reason(error)}).")
    return CorruptFileError(
        f"The weights of {name} cannot be read ({_reason(error)}): fetch the model again."
    )


def _check_vocabulary(tokenizer: "PreTrainedTokenizerBase", num_rows: int, name: str) -> None:
    """CorruptFileError for a tokenizer that writes ordinary text with ids that the model has no embedding for.

    Ids of special tokens may lie beyond, and so may the unknown token's: such models are about.
    """
    try:
        ids = tokenizer("The quick brown fox: 12 + 30 = 42", add_special_tokens=False)["input_ids"]
    except Exception:
        # Some tokenizers cannot write this text, and say so in ways of their own. A prompt will show it.
        return
    largest = max(set(ids) - {None, *tokenizer.all_special_ids}, default=0)
    if largest >= num_rows:
        raise CorruptFileError(
            f"the tokenizer of {name} gives token id {largest}, but the model knows 0 to {num_rows - 1}: they are of "
            "different models; put the model's own tokenizer into its folder."
        )


def _read_tokenizer(folder: Path, name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        with quiet_libraries():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise CorruptFileError(
            f"The tokenizer of {name} is missing or unreadable: fetch tokenizer.json and its config again."
        ) from error
    return tokenizer


def _place(model: "PreTrainedModel", device: str) -> None:
    try:
        model.to(device)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise UserInputError(
            f"The model cannot be moved to {device} ({_reason(error)}): choose another device or dtype."
        ) from error


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:160]
