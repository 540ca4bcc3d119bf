"""Weight files before and after they are loaded: they must hold what the config says, and numbers only."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthrus.base.json_text import parse_json
from orthrus.base.quantised import stored_parts
from orthrus.errors import CorruptFileError, UserInputError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

INDEX_FILE = "model.safetensors.index.json"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Tables that older releases of transformers wrote, and newer ones compute.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$")
# A config that is merely wrong describes a model of about the size of its files; one made to harm, any size.
_MOST_LARGER = 2.0
_SMALL = 10_000_000

Extra = Callable[[str], bool]
"""Whether a tensor of that name belongs to something else that is stored in the same files."""


def shapes_in(folder: Path, extra: Extra | None = None) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor in a folder's safetensors files, headers read only; {} without files.

    Raises:
        CorruptFileError: a file that is missing, or whose header does not fit its size.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if extra is None or not extra(name):
                        found[name] = (file, tuple(opened.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(f"{file} cannot be read ({error}): fetch it again.") from error
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: those that transformers loads. [] if there are none.

    Raises CorruptFileError for an unreadable index, and for a file that the index names and that is missing.
    """
    single, index = folder / "model.safetensors", folder / INDEX_FILE
    if single.is_file():
        # transformers reads an index only where this file is missing.
        return [single]
    if not index.is_file():
        return []
    try:
        names = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptFileError(f"{index} is unreadable: fetch the model again.") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CorruptFileError(f"{index} names files outside its folder: fetch the model again.")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CorruptFileError(
            f"{folder.name} lacks {len(absent)} of {len(names)} weight files, {absent[0]} first: fetch them "
            "again."
        )
    return [folder / name for name in names]


def check_sizes(
    config: "PreTrainedConfig", shapes: dict[str, tuple[Path, tuple[int, ...]]], name: str, *, packed: bool
) -> None:
    """Compare a config with the shapes in the files, before anything of that size is allocated.

    packed: the files hold quantised weights, of other shapes than the layers'.

    Raises:
        CorruptFileError: a size below one, another number of layers, other shapes, or a model that is far
            larger than its files.
    """
    for size in _SIZES:
        value = getattr(config, size, None)
        if type(value) is not int or value < 1:
            raise CorruptFileError(
                f"config.json of {name} says {size} = {value!r}, and it must be at least 1: fetch it again."
            )
    if not shapes:
        return
    layers = {int(match[1]) for key in shapes if (match := _LAYER.search(key)) is not None}
    wanted: int = config.num_hidden_layers
    if layers and max(layers) + 1 != wanted:
        few = "lack layers: they hold" if max(layers) + 1 < wanted else "hold more layers:"
        raise CorruptFileError(
            f"The weights of {name} {few} {max(layers) + 1}, and config.json says {wanted}: the two do not "
            "belong together, fetch both again."
        )
    expected = _expected_shapes(config, name)
    if not packed:
        for key, (file, shape) in shapes.items():
            if key in expected and expected[key] != shape:
                raise CorruptFileError(
                    f"{key} in {file.name} of {name} has shape {shape}, but config.json asks for "
                    f"{expected[key]}: the two do not belong together, fetch both again."
                )
    described, stored = _num_elements(expected.values()), _num_elements(s for _, s in shapes.values())
    # A packed weight holds up to eight numbers in one element.
    if described > _MOST_LARGER * (8 if packed else 1) * stored + _SMALL:
        raise CorruptFileError(
            f"config.json of {name} describes {described:,} weights, but its files hold {stored:,}: the two "
            "do not belong together, fetch both again."
        )


def _expected_shapes(config: "PreTrainedConfig", name: str) -> dict[str, tuple[int, ...]]:
    """What the stock model's parameters are called and how large they are; nothing is allocated."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plain)
    except Exception as error:
        reason = " ".join(str(error).split())[:160].rstrip(".:")
        raise CorruptFileError(
            f"config.json of {name} describes no model that can be built ({reason}): fetch it again."
        ) from error
    return {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}


def _num_elements(shapes: Iterable[tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def check_all_used(unexpected: Iterable[str], name: str, extra: Extra | None = None) -> None:
    """Refuse tensors of the decoder that the config has no place for: without them it is another model.

    Raises:
        CorruptFileError: names the first.
    """
    lost = sorted(
        key
        for key in unexpected
        if _LAYER.search(key) and not _COMPUTED.search(key) and (extra is None or not extra(key))
    )
    if lost:
        raise CorruptFileError(
            f"config.json of {name} has no place for {len(lost)} tensors of its weights, {lost[0]} first: "
            "the two do not belong together, fetch both again."
        )


def check_finite(model: "nn.Module", shapes: dict[str, tuple[Path, tuple[int, ...]]], name: str) -> None:
    """Refuse a model with a weight that is no finite number.

    Raises:
        CorruptFileError: it is in the file, which is named.
        UserInputError: the number in the file is too large for the dtype that was asked for.
    """
    for key, parameter in model.named_parameters():
        if all(is_finite(part) for part in stored_parts(parameter.detach())):
            continue
        file = shapes[key][0] if key in shapes else None
        if file is not None and _finite_in(file, key):
            raise UserInputError(
                f"{key} of {name} overflows in {str(parameter.dtype).removeprefix('torch.')}: load it in "
                "float32 or bfloat16."
            )
        where = name if file is None else str(file)
        raise CorruptFileError(
            f"{key} in {where} holds a number that is not finite (NaN or Inf): fetch the file again, or "
            "make it anew."
        )


def is_finite(tensor: "Tensor") -> bool:
    """Whether a tensor holds neither NaN nor Inf; makes no copy of it."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        # Eight-bit floats have no arithmetic.
        tensor = tensor.to(torch.float32)
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _finite_in(file: Path, key: str) -> bool:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        tensor: Any = opened.get_tensor(key)
        return is_finite(tensor)
