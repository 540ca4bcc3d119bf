"""Quantised bases: what their method is called, whether it runs here, and the weights that they stand for.

The arithmetic is the quantisation library's own. All that is needed of it here are plain weights, which a
full-rank diffusion twin starts from, and those follow from what a linear layer makes of unit vectors.
"""

import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from orthrus.errors import MissingExtraError, UnsupportedModelError, UserInputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

# The packages that a method's checkpoints load with, where one can be named; of others transformers speaks.
_INSTALL = {"torchao": 'pip install "orthrus-lm[quant]"', "bitsandbytes": "pip install bitsandbytes"}
_BATCH = 1024
# Half precision is some hundredths off; a gradient that is lost is off by its whole length.
_GRADIENT_TOLERANCE = 0.1


def quantisation(config: "PreTrainedConfig") -> str | None:
    """Method and kind of a checkpoint's quantised weights, such as "torchao Int8WeightOnly"; None without."""
    declared: Any = getattr(config, "quantization_config", None)
    if declared is None:
        return None
    fields: dict[str, Any] = declared if isinstance(declared, dict) else declared.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    if method == "torchao":
        return f"torchao {_torchao_kind(fields.get('quant_type'))}".strip()
    if fields.get("load_in_8bit"):
        return "bitsandbytes 8-bit"
    if fields.get("load_in_4bit"):
        return f"bitsandbytes 4-bit {fields.get('bnb_4bit_quant_type', '')}".strip()
    return f"{method} {fields['bits']}-bit" if fields.get("bits") else method


def _torchao_kind(declared: Any) -> str:
    """The config's class without its last word, and the weights' type where the class leaves it open."""
    kind = declared.get("default", declared) if isinstance(declared, dict) else declared
    if not isinstance(kind, dict):
        return str(kind or "")
    name = str(kind.get("_type", "")).removesuffix("Config")
    data = kind.get("_data")
    weights = data.get("weight_dtype") if isinstance(data, dict) else None
    return f"{name} {weights['_data']}" if isinstance(weights, dict) and "_data" in weights else name


def check_installed(method: str, name: str) -> None:
    """MissingExtraError when the package that reads a method's checkpoints is not there."""
    package = method.partition(" ")[0]
    if package in _INSTALL and find_spec(package) is None:
        raise MissingExtraError(
            f"{name} is quantised ({method}), which needs one more package; run `{_INSTALL[package]}`."
        )


def check_runs(model: "PreTrainedModel", method: str, name: str) -> None:
    """Run one row through a quantised linear, on a copy, for some kernels refuse only then.

    Raises UnsupportedModelError when the method has no code for this machine or this layer.
    """
    import torch

    linear = next((module for module in model.modules() if is_quantised(module)), None)
    if linear is None:
        return
    try:
        with torch.no_grad():
            # Some libraries repack their weights at the first call: the fingerprint must not depend on it.
            row_1C = torch.zeros(1, int(linear.in_features), dtype=model.dtype, device=model.device)  # type: ignore[arg-type]
            copy.deepcopy(linear)(row_1C)
    except Exception as error:
        raise cannot_run(method, name, error) from error


def check_gradients(model: "PreTrainedModel", name: str) -> None:
    """Refuse to train through a base whose quantised layers drop the gradient, as rounded activations do.

    Raises UserInputError when the gradient of a layer is not that of the matrix that it stands for.
    """
    import torch

    linear = next((module for module in model.modules() if is_quantised(module)), None)
    if linear is None:
        return
    probe = copy.deepcopy(linear)
    weight_OI = plain_weight(probe, model.dtype)
    x_1I = torch.ones_like(weight_OI[:1], requires_grad=True)
    wanted_1I = weight_OI.float().sum(0, keepdim=True)
    try:
        probe(x_1I).sum().backward()
        found_1I = torch.zeros_like(wanted_1I) if x_1I.grad is None else x_1I.grad.float()
    except (RuntimeError, NotImplementedError):
        found_1I = torch.zeros_like(wanted_1I)
    if (found_1I - wanted_1I).norm() > _GRADIENT_TOLERANCE * wanted_1I.norm():
        raise UserInputError(
            f"no gradient passes through the quantised layers of {name} here ({quantisation(model.config)}): "
            "train the view on the unquantised model, and load it with this base afterwards."
        )


def cannot_run(method: str, name: str, error: BaseException) -> UnsupportedModelError:
    """The sentence for a quantised model that does not load or run here."""
    lines = str(error).strip().splitlines()
    reason = (lines[0] if lines else type(error).__name__).rstrip(".:!")[:160]
    return UnsupportedModelError(
        f"{name} is quantised ({method}), and that does not run on this machine ({reason}): choose another "
        "device or dtype, another quantisation, or the model's unquantised weights."
    )


def is_quantised(module: "nn.Module") -> bool:
    """Whether a module is a linear layer whose weight is no ordinary matrix (outputs, inputs)."""
    import torch
    from torch import nn

    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return False
    weight = getattr(module, "weight", None)
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()  # type: ignore[union-attr]
    return not (plain and weight.shape == (module.out_features, module.in_features))  # type: ignore[union-attr]


def plain_weight(linear: "nn.Module", dtype: "torch.dtype") -> "Tensor":
    """The matrix (O, I) that a quantised linear layer applies, as an ordinary tensor on the layer's device.

    The library's own unpacking where the weight offers it; else the layer's answers to unit vectors, which
    works for every method, up to how it rounds activations.
    """
    import torch

    with torch.no_grad():
        weight = getattr(linear, "weight", None)
        # Ordinary tensors have a method of that name too, which does something else.
        if type(weight) is not torch.Tensor and "dequantize" in vars(type(weight)):
            return weight.dequantize().detach().to(dtype)  # type: ignore[union-attr, no-any-return]
        num_inputs = int(linear.in_features)  # type: ignore[arg-type]
        device = next(t.device for t in (*linear.parameters(), *linear.buffers()))
        bias = getattr(linear, "bias", None)
        columns = []
        for start in range(0, num_inputs, _BATCH):
            rows = torch.arange(start, min(start + _BATCH, num_inputs), device=device)
            answers_BO = linear(torch.nn.functional.one_hot(rows, num_inputs).to(dtype))
            columns.append(answers_BO if bias is None else answers_BO - bias)
        return torch.cat(columns).T.to(dtype).contiguous()


def plain_linear(linear: "nn.Module", dtype: "torch.dtype") -> "nn.Linear":
    """An ordinary, trainable linear layer in `dtype` with the weights that a quantised one stands for."""
    import torch
    from torch import nn

    weight_OI = plain_weight(linear, dtype)
    bias = getattr(linear, "bias", None)
    num_outputs, num_inputs = weight_OI.shape
    # Nothing is drawn: the values that a new layer starts with would move the random state.
    made: nn.Linear = nn.utils.skip_init(
        nn.Linear, num_inputs, num_outputs, bias=bias is not None, device=weight_OI.device, dtype=dtype
    )
    with torch.no_grad():
        made.weight.copy_(weight_OI)
        if bias is not None:
            made.bias.copy_(bias)
    return made


def stored_parts(tensor: "Tensor") -> "list[Tensor]":
    """The ordinary tensors that a parameter consists of: itself, or the packed numbers and scales inside."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in stored_parts(getattr(tensor, name))]
