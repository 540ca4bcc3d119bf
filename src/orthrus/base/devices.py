"""Check and fill in where the model runs, in which precision, and with which attention code."""

import difflib
from typing import TYPE_CHECKING, Any, Literal, get_args

from orthrus.errors import UnsupportedModelError, UserInputError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
Precision = Literal["int8", "int4"]
QUANTISED: tuple[Precision, ...] = get_args(Precision)
"""Asked for as a dtype: the linears are quantised once the model is loaded in float32."""
ATTENTION = ("eager", "sdpa", "flex_attention")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_LOCAL_IMPLEMENTATIONS = (*ATTENTION, "flash_attention_2", "flash_attention_3", "batched_mm", "grouped_mm")


def pick_device(device: str | None) -> str:
    """The device to use; None becomes the first of cuda, mps and cpu that is there.

    Raises:
        UserInputError: an unknown device, or one that this machine has not.
    """
    import torch

    if device is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise UserInputError(f"'{device}' is no device: use 'cpu', 'cuda', 'cuda:1' or 'mps'.") from error
    if parsed.type == "cpu":
        return device
    if parsed.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (parsed.index or 0) < count:
            return device
        found = f"this machine has {count} CUDA devices" if count else "no CUDA device is visible here"
        raise UserInputError(f"'{device}' cannot be used, {found}: choose another device, such as 'cpu'.")
    if parsed.type == "mps":
        if torch.backends.mps.is_available():
            return device
        raise UserInputError("'mps' cannot be used, this machine has no Apple GPU: use 'cpu'.")
    raise UserInputError(f"'{device}' is not supported: use 'cpu', 'cuda', 'cuda:1' or 'mps'.")


def pick_dtype(dtype: "str | torch.dtype | None", device: str) -> "torch.dtype | None":
    """The dtype to load in; None stands for the checkpoint's own.

    Raises:
        UserInputError: not one of float32, bfloat16, float16 and "auto".
    """
    import torch

    if dtype is None:
        # A CPU computes float32 as fast, and there greedy output is equal token for token.
        return torch.float32 if device.split(":")[0] == "cpu" else None
    if dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES or (isinstance(dtype, str) and dtype != name):
        close = difflib.get_close_matches(name, DTYPES, n=1)
        if close:
            hint = f"did you mean '{close[0]}'?"
        else:
            every = ", ".join((*DTYPES, "auto"))
            hint = f"use one of {every}; on a CPU models with a view run in int8 and int4 too."
        raise UserInputError(f"'{dtype}' is no dtype for a model: {hint}")
    found: torch.dtype = getattr(torch, name)
    return found


def check_attention(implementation: str | None, device: str) -> None:
    """Refuse attention code that takes no ready-made mask, or that the device cannot run.

    Raises:
        UserInputError: flash attention, an unknown name, or flex attention on a CPU.
    """
    if implementation == "flex_attention" and device.split(":")[0] == "cpu":
        # transformers compiles it, and torch's CPU code for it corrupts memory (seen with torch 2.13).
        raise UserInputError("'flex_attention' is not safe on a CPU: use 'eager' or 'sdpa' there.")
    if implementation is None or implementation in ATTENTION:
        return
    choices = ", ".join(f"'{name}'" for name in ATTENTION)
    if "flash" in implementation:
        raise UserInputError(
            f"'{implementation}' takes no custom attention mask, which drafting needs: use one of {choices}."
        )
    raise UserInputError(
        f"'{implementation}' is no attention implementation for Orthrus: use one of {choices}."
    )


def refuse_foreign_code(declared: dict[str, Any], name: str) -> None:
    """UnsupportedModelError for a config that asks for code from a hub, also in a config inside it."""
    for key, value in declared.items():
        if isinstance(value, dict):
            refuse_foreign_code(value, name)
        elif str(key).strip("_").removesuffix("_internal") in _IMPLEMENTATIONS and value not in (
            None,
            *_LOCAL_IMPLEMENTATIONS,
        ):
            raise UnsupportedModelError(
                f"config.json of {name} asks for {key} = {value!r}, which may be code from a hub: remove "
                f"that line, or set it to one of {', '.join(_LOCAL_IMPLEMENTATIONS)}."
            )


def synchronize(device: "torch.device") -> None:
    """Wait until the device has done all it was asked for: a clock read before that lies."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
