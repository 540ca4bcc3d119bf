"""int8 in place of a loaded model's linears: for both views, or for the drafts alone."""

from collections.abc import Iterator

from torch import nn

from orthrus.base.families import decoder_layers
from orthrus.model.dual_view import DualView
from orthrus.model.int8_linear import Int8Linear, check_int8
from orthrus.model.twin import LowRank, Twin, twins


def quantise(dual: DualView) -> None:
    """Make every linear of the decoder layers and the head an `Int8Linear`, those of both views.

    Weights that are in no linear (experts) stay. What was loaded is the base no longer: the int8 model is,
    and lossless means equal to it, decoded plainly. UserInputError where int8 does not run.
    """
    check_int8(dual.device)
    dual.count_view_parameters()
    for layer in decoder_layers(dual.base):
        for parent, name, linear in list(_linears(layer)):
            setattr(parent, name, Int8Linear.of(linear))
    head = dual.base.get_output_embeddings()
    if type(head) is nn.Linear:
        dual.base.set_output_embeddings(Int8Linear.of(head))
    dual.precision = "int8"


def quantise_drafts(dual: DualView) -> None:
    """Let block rows run through int8 copies of all linears; AR rows, and so the text, stay as they are.

    Low-rank twins share their AR projection with all rows and stay as they are too. UserInputError where int8
    does not run.
    """
    check_int8(dual.device)
    dual.count_view_parameters()
    for twin in twins(dual.base).values():
        if type(twin.diffusion) is nn.Linear:
            twin.diffusion = Int8Linear.of(twin.diffusion)
    for layer in decoder_layers(dual.base):
        for parent, name, linear in list(_linears(layer)):
            if not isinstance(parent, Twin | LowRank):
                setattr(parent, name, Twin(linear, Int8Linear.of(linear), dual.split))
    head = dual.base.get_output_embeddings()
    if type(head) is nn.Linear:
        dual.draft_head = Int8Linear.of(head)
    dual.draft_precision = "int8"


def _linears(layer: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, linear) of every plain linear below a module."""
    for parent in layer.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                yield parent, name, child
