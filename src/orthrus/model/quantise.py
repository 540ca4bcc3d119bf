"""Replaces a loaded model's linear layers by int8 or 4-bit ones, for both views or only for drafts."""

from collections.abc import Iterator

from torch import nn

from orthrus.base.devices import Precision
from orthrus.base.families import decoder_layers
from orthrus.model.dual_view import DualView
from orthrus.model.int4_linear import Int4Linear, fits_groups
from orthrus.model.int8_linear import Int8Linear, check_quantised
from orthrus.model.twin import LowRank, Twin, twins


def quantise(dual: DualView, precision: Precision) -> None:
    """Quantise the head, and all linear layers of the decoder layers, of both views.

    With int4, some become int8: the head, diffusion twins, which draft worse in four bits, and layers whose inputs are
    not whole groups. Weights outside of linear layers (experts) stay. The quantised model is then the base, and
    lossless means equal to its plain decoding. Raises UserInputError if it cannot run on this device.
    """
    check_quantised(precision, dual.device)
    dual.count_view_parameters()
    for layer in decoder_layers(dual.base):
        for parent, name, linear in list(_linears(layer)):
            is_diffusion = isinstance(parent, Twin) and linear is parent.diffusion
            setattr(parent, name, _quantised(linear, "int8" if is_diffusion else precision))
    head = dual.base.get_output_embeddings()
    if type(head) is nn.Linear:
        dual.base.set_output_embeddings(Int8Linear.of(head))
    dual.precision = precision


def quantise_drafts(dual: DualView, precision: Precision) -> None:
    """Let block rows run through quantised copies of all linear layers. AR rows, and so the text, do not change.

    Diffusion twins become int8 in either precision, as in `quantise`. Low-rank twins use the AR projection of all rows,
    so they stay as they are. Raises UserInputError if it cannot run on this device.
    """
    check_quantised(precision, dual.device)
    dual.count_view_parameters()
    for twin in twins(dual.base).values():
        if type(twin.diffusion) is nn.Linear:
            twin.diffusion = Int8Linear.of(twin.diffusion)
    for layer in decoder_layers(dual.base):
        for parent, name, linear in list(_linears(layer)):
            if not isinstance(parent, Twin | LowRank):
                setattr(parent, name, Twin(linear, _quantised(linear, precision), dual.split))
    head = dual.base.get_output_embeddings()
    if type(head) is nn.Linear:
        dual.draft_head = Int8Linear.of(head)
    dual.draft_precision = precision


def _quantised(linear: nn.Linear, precision: Precision) -> nn.Module:
    if precision == "int4" and fits_groups(linear):
        return Int4Linear.of(linear)
    return Int8Linear.of(linear)


def _linears(layer: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, linear) of every ordinary linear layer below a module."""
    for parent in layer.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                yield parent, name, child
