"""Exp(1) noise as a pure function of seed, position and token id: sampling without a generator's state."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_MASK = 2**64 - 1


def exponential_noise(
    seed: int, positions: Sequence[int], vocab_size: int, device: torch.device | str
) -> Tensor:
    """One row of noise per position; noise_RV float32, positive and finite, distributed as Exp(1).

    seed: 0 to 2**63 - 1. positions: from 0. A row depends only on the seed and its own position, so it is the same
    alone, in a batch, and in any later pass. It is computed from integers: SplitMix64's finaliser over the mixed
    token id xor the mixed seed and position. The integers are the same on every device. Their logarithm may differ in
    its last bit.
    """
    if not positions:
        return torch.empty(0, vocab_size, device=device)
    # Siblings of a draft tree have the same position, so their noise is computed once.
    slots = {position: slot for slot, position in enumerate(dict.fromkeys(positions))}
    keys = [_signed(row_key(seed, position)) for position in slots]
    noise_UV = torch.empty(len(keys), vocab_size, device=device)
    # On a CPU, a few rows at a time stay in the cache. On a GPU, one launch computes all rows.
    step = max(1, 2**16 // vocab_size) if noise_UV.device.type == "cpu" else len(keys)
    keys_U1 = torch.tensor(keys, device=device)[:, None]
    for some_U1, out_UV in zip(keys_U1.split(step), noise_UV.split(step), strict=True):
        # |x| / 2**63 is uniform, with all of float32's precision near 0, where the race is decided.
        out_UV.copy_(hashed(some_U1, vocab_size)).abs_().mul_(-(2.0**-63))
        # Rounding must give neither 0 nor 1: their logarithms would be noise 0 or infinity.
        out_UV.clamp_(2.0**-24 - 1.0, -(2.0**-64)).log1p_().neg_()
    if len(keys) == len(positions):
        return noise_UV
    return noise_UV[torch.tensor([slots[position] for position in positions], device=device)]


def row_key(seed: int, position: int) -> int:
    """The 64 bits that identify a row of noise. For each seed they are a bijection of the position."""
    return _mix((_mix((seed + _GAMMA) & _MASK) + position * _GAMMA) & _MASK)


def choice_seed(seed: int, index: int) -> int:
    """The seed of the `index`-th of several answers to one request. The first answer has `seed` itself.

    seed and the result are from 0 to 2**63 - 1. The result is 63 bits of the key of a row far beyond any text.
    """
    return seed if index == 0 else row_key(seed, 2**63 + index) >> 1


def hashed(keys_R1: Tensor, vocab_size: int) -> Tensor:
    """64 bits per row key and token id, of which the high ones are mixed best: keys_R1 int64 -> bits_RV int64.

    The finaliser's first shift is linear in xor, so it is applied to both parts beforehand. Its last shift would not
    change the high 31 bits, so it is left out.
    """
    bits_RV = _shifted_xor(keys_R1.clone(), _SHIFTS[0]) ^ _token_part(vocab_size, keys_R1.device)
    bits_RV.mul_(_signed(_MULTIPLIERS[0]))
    return _shifted_xor(bits_RV, _SHIFTS[1]).mul_(_signed(_MULTIPLIERS[1]))


@lru_cache(maxsize=8)
def _token_part(vocab_size: int, device: torch.device) -> Tensor:
    """Every token id, mixed, with the next finaliser's first shift done; part_V int64."""
    part_V = torch.arange(vocab_size).mul_(_signed(_GAMMA))
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        part_V = _shifted_xor(part_V, shift).mul_(_signed(multiplier))
    return _shifted_xor(part_V, _SHIFTS[0]).to(device)


def _shifted_xor(bits: Tensor, shift: int) -> Tensor:
    """In place, bits ^= bits >> shift, as a logical shift: a mask removes the sign bits that int64's shift adds."""
    return bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def _mix(value: int) -> int:
    """SplitMix64's finaliser on a Python integer (Steele, Lea and Flood, OOPSLA 2014)."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        value = ((value ^ (value >> shift)) * multiplier) & _MASK
    return value


def _signed(value: int) -> int:
    """The int64 with these 64 bits."""
    return value - 2**64 if value >= 2**63 else value
