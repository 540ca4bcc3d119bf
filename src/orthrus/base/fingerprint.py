"""A short name for a set of weights, by which a trained view recognises its own base."""

import hashlib
from typing import TYPE_CHECKING

from orthrus.base.quantised import stored_parts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

NUM_SAMPLES = 1024


def fingerprint(model: "nn.Module") -> str:
    """Digest of a model's parameters: "blake2b:" and 32 hex digits.

    As `weights_fingerprint`; a tied tensor counts once, buffers do not count. Take it before twins are put in: they
    change the names.
    """
    # named_parameters yields a tied tensor under its first name only.
    return weights_fingerprint(model.named_parameters())


def weights_fingerprint(named: "Iterable[tuple[str, Tensor]]") -> str:
    """Digest of weights by name, such as those of a view: "blake2b:" and 32 hex digits.

    Covers the sorted names, the shapes, and up to 1024 evenly spaced entries of each tensor, rounded to bfloat16, so
    that loading the same checkpoint in another precision keeps the name. A quantised weight counts as the numbers
    that it is stored as.
    """
    import torch

    digest = hashlib.blake2b(digest_size=16)
    samples: list[torch.Tensor] = []
    for name, parameter in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
        for part in stored_parts(parameter.detach()):
            values = part.reshape(-1)
            picked = values[:: max(1, -(-values.numel() // NUM_SAMPLES))]
            if picked.is_floating_point():
                picked = picked.to(torch.bfloat16).view(torch.int16)
            samples.append(picked.contiguous().view(torch.uint8))
    if samples:
        # One transfer: hundreds of small copies from an accelerator would take longer than the hash.
        device = samples[0].device
        digest.update(torch.cat([sample.to(device) for sample in samples]).cpu().numpy().tobytes())
    return f"blake2b:{digest.hexdigest()}"
