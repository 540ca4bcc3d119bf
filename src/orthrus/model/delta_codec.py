"""Encodes views as 4-bit differences from the AR twins, which take about an eighth of the size of float32 weights.

Each group of inputs has one bfloat16 scale, and codes from -7 to 7, two to a byte. Vectors (norms, biases, the mask
embedding) stay float32. So do tensors without an AR tensor of their shape (the factors of low-rank twins). A repair
head is stored in bfloat16.

Letters: O output rows, I inputs, G groups of `GROUP` inputs, S = GROUP.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from orthrus.errors import CorruptFileError
from orthrus.model.names import REPAIR_PREFIX

GROUP = 64
CODES, SCALES = ".codes", ".scales"
_LIMIT = 7
# The codes to which the largest difference of a group may be scaled. Beyond 7 it is clipped, so that small differences
# become more exact.
_PEAKS = (1.0, 2.0, 3.0, 4.0, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0, 8.5, 9.0, 10.0)
# A peak must save this share of a group's energy to win, so that rounding errors do not choose between equal ones.
_LEAST_GAIN = 5e-5
# A peak also wins if it reproduces the group exactly: a group that was encoded before gets its old codes.
_EXACT, _NEAR = 1e-2, 1e-7


def encode_tensors(tensors: Mapping[str, Tensor], twins: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoded form of view tensors, all under their file names.

    twins: the frozen AR weights from which differences are taken, by the names of their view tensors. Matrices become
    `NAME.codes` (O, ceil(I / 2)) uint8 and `NAME.scales` (O, G) bfloat16.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(REPAIR_PREFIX):
            stored[name] = tensor.bfloat16()
            continue
        if tensor.ndim != 2 or name not in twins:
            stored[name] = tensor.float()
            continue
        codes_OI, scales_OG = quantise(tensor.float() - twins[name].to(tensor.device).float())
        stored[name + CODES], stored[name + SCALES] = _pack(codes_OI), scales_OG
    return stored


def decode_tensors(
    stored: Mapping[str, Tensor], twins: Mapping[str, Tensor], *, where: str
) -> dict[str, Tensor]:
    """The inverse of `encode_tensors`: view tensors in float32 on the CPU, AR weight plus difference.

    The entry of a name without a twin is unchanged or empty, and the caller must refuse it. Raises CorruptFileError
    for codes or scales that are missing, misshapen or out of range.
    """
    tensors: dict[str, Tensor] = {}
    for name in _names(stored):
        if name in stored or name not in twins:
            tensors[name] = stored.get(name, torch.empty(0))
            continue
        base_OI = twins[name].detach().cpu().float()
        codes, scales = stored.get(name + CODES), stored.get(name + SCALES)
        problem = _problem(codes, scales, tuple(base_OI.shape))
        if problem or codes is None or scales is None:
            raise CorruptFileError(
                f"the view in {where} is damaged: {name} {problem}; copy or download the view folder again."
            )
        tensors[name] = base_OI + _dequantise(_unpack(codes, base_OI.shape[1]), scales)
    return tensors


def quantise(delta_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (O, I) and scales bfloat16 (O, G), with about the smallest squared error in each group."""
    num_inputs = delta_OI.shape[1]
    delta_OGS = pad(delta_OI, (0, -num_inputs % GROUP)).unflatten(1, (-1, GROUP))
    peak_OG = delta_OGS.abs().amax(-1)
    energy_OG = delta_OGS.square().sum(-1)
    best_error_OG = torch.full_like(peak_OG, torch.inf)
    best_codes_OGS = torch.zeros_like(delta_OGS, dtype=torch.int8)
    best_scale_OG = torch.zeros_like(peak_OG, dtype=torch.bfloat16)
    for peak in _PEAKS:
        trial_OG1 = (peak_OG / peak)[..., None]
        codes_OGS = (delta_OGS / trial_OG1).nan_to_num(0.0).round().clamp(-_LIMIT, _LIMIT)
        # The closed form of the best scale for these codes.
        scale_OG = (delta_OGS * codes_OGS).sum(-1) / codes_OGS.square().sum(-1).clamp_min(1.0)
        scale_OG = scale_OG.bfloat16()
        error_OG = (delta_OGS - codes_OGS * scale_OG.float()[..., None]).square().sum(-1)
        better_OG = error_OG + _LEAST_GAIN * energy_OG < best_error_OG
        better_OG |= (error_OG < _EXACT * best_error_OG) & (best_error_OG > _NEAR * energy_OG)
        best_error_OG = error_OG.where(better_OG, best_error_OG)
        best_scale_OG = scale_OG.where(better_OG, best_scale_OG)
        best_codes_OGS = codes_OGS.to(torch.int8).where(better_OG[..., None], best_codes_OGS)
    return best_codes_OGS.flatten(1)[:, :num_inputs], best_scale_OG


def _dequantise(codes_OI: Tensor, scales_OG: Tensor) -> Tensor:
    scales_OI = scales_OG.float().repeat_interleave(GROUP, dim=1)[:, : codes_OI.shape[1]]
    return codes_OI * scales_OI


def _pack(codes_OI: Tensor) -> Tensor:
    """Two codes in a byte, each plus 8: even inputs in the low half, odd ones in the high half."""
    halves = (pad(codes_OI, (0, codes_OI.shape[1] % 2)) + 8).to(torch.uint8)
    return halves[:, 0::2] | halves[:, 1::2] << 4


def _unpack(packed: Tensor, num_inputs: int) -> Tensor:
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :num_inputs]
    return halves.to(torch.int8) - 8


def _problem(codes: Tensor | None, scales: Tensor | None, shape: tuple[int, ...]) -> str:
    """What is wrong with a stored matrix; empty if nothing is."""
    if codes is None or scales is None:
        return "lacks its codes or its scales"
    rows, num_inputs = shape
    expected = (rows, -(-num_inputs // 2)), (rows, -(-num_inputs // GROUP))
    found = tuple(codes.shape), tuple(scales.shape)
    if found != expected:
        return f"has {found[0]} codes and {found[1]} scales, not {expected[0]} and {expected[1]}"
    if codes.dtype != torch.uint8 or scales.dtype != torch.bfloat16:
        return f"is stored as {codes.dtype} and {scales.dtype}"
    if not scales.isfinite().all():
        return "has a scale that is not a number"
    return "has a code below -7" if bool((_unpack(codes, num_inputs) < -_LIMIT).any()) else ""


def _names(stored: Mapping[str, Tensor]) -> Iterator[str]:
    """The names of the encoded tensors, each once."""
    seen: set[str] = set()
    for key in stored:
        name = key.removesuffix(CODES).removesuffix(SCALES)
        if name not in seen:
            seen.add(name)
            yield name
