"""Finds faults of the model itself. No comparison of texts shows them, because both sides would share them."""

import torch
from torch import nn

from orthrus.api import Orthrus
from orthrus.base.fingerprint import fingerprint
from orthrus.model.shadow import shadow
from orthrus.model.twin import Twin


def model_faults(orthrus: Orthrus) -> list[str]:
    """One sentence for each fault.

    A view that holds NaN gives right text, but drafts nothing. Swapped twins have the base's own weights on the
    diffusion side, which makes the baseline wrong too. A base other than the view's own, such as a fine-tuned one, is
    no fault.
    """
    dual = orthrus.dual
    faults = [
        f"the view's {name} holds NaN or infinite numbers: it can draft nothing"
        for name, parameter in dual.view_parameters().items()
        if parameter.is_floating_point() and not bool(parameter.detach().isfinite().all())
    ][:1]
    expected = dual.config.base_fingerprint
    # Weights that were quantised in memory, or rounded to float16, differ from the stored ones by intent.
    is_as_stored = dual.precision is None and dual.dtype in (torch.float32, torch.bfloat16)
    if not (expected and is_as_stored) or fingerprint(dual.stock()) == expected:
        return faults

    def view_side(path: str, module: nn.Module) -> nn.Module | None:
        return module.diffusion if isinstance(module, Twin) else None

    if fingerprint(shadow(dual.base, view_side)) == expected:
        faults.append("the twins are swapped: the base's own weights lie on the diffusion side")
    return faults
