"""A short name for a set of weights, so that a trained view can tell whether it sits on its own base."""

import hashlib
from typing import TYPE_CHECKING

from orthrus.base.quantised import stored_parts

if TYPE_CHECKING:
    from torch import nn

NUM_SAMPLES = 1024


def fingerprint(model: "nn.Module") -> str:
    """Digest of a model's parameters: "blake2b:" and 32 hex digits.

    Covers the sorted parameter names, their shapes, and up to 1024 evenly spaced entries of each tensor,
    rounded to bfloat16, so that loading the same checkpoint in another precision keeps the name. A tied
    tensor counts once; buffers do not count. A quantised weight counts as the numbers that it is stored as.
    Take it before twins are put in: they change the names.
    """
    import torch

    digest = hashlib.blake2b(digest_size=16)
    samples: list[torch.Tensor] = []
    # named_parameters yields a tied tensor under its first name only.
    for name, parameter in sorted(model.named_parameters()):
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
