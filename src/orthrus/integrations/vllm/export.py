"""`orthrus export vllm`: one folder that vLLM loads, base and view, whatever the view's own layout is.

The folder is a stock one with another architecture's name, the view's settings in config.json, and the
diffusion twins as tensors `*_diff` beside the AR ones. Twins are written full: low-rank ones are added to their
AR projection, and where only some of a layer's attention has twins, the rest gets copies.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from orthrus.base.families import decoder_layers
from orthrus.base.loading import Base
from orthrus.base.outputs import atomic_folder
from orthrus.base.quantised import quantisation
from orthrus.errors import CheckpointError
from orthrus.integrations.vllm.names import CONFIG_KEY, architecture_of
from orthrus.model.checkpoint import check_unquantised, read_json, view_tensors, write_json
from orthrus.model.dual_view import DualView
from orthrus.model.merged import add_shard
from orthrus.model.names import MASK_EMBEDDING_NAME, REPAIR_PREFIX, to_file
from orthrus.model.twin import LowRank, LowRankTwin, Twin
from orthrus.model.view_config import ViewConfig


def export_vllm(dual: DualView, base: Base, folder: Path) -> ViewConfig:
    """Write the folder, never half-written; what it says of the view is returned.

    Raises UnsupportedModelError for a family without a class in vLLM, CheckpointError for a quantised base or a
    view with twins in the MLP, UserInputError when the folder exists.
    """
    architecture = architecture_of(dual.family.name)
    check_unquantised(dual)
    if (method := quantisation(dual.base.config)) is not None:
        raise CheckpointError(
            f"the base is quantised ({method}), and only ordinary weights can be written: export the view on "
            "its unquantised base, and let vLLM quantise."
        )
    config, tensors = full_view(dual)
    with atomic_folder(folder) as temporary:
        dual.stock().save_pretrained(temporary)
        base.tokenizer.save_pretrained(temporary)
        stock = read_json(temporary / "config.json")
        settings = config.to_dict()
        # Pages of text about training; the view's own folder keeps them.
        settings["provenance"] = {}
        write_json(temporary / "config.json", stock | {"architectures": [architecture], CONFIG_KEY: settings})
        add_shard(temporary, tensors)
    return config


def full_view(dual: DualView) -> tuple[ViewConfig, dict[str, Tensor]]:
    """The view with full twins of all attention in each layer that has any: settings, and tensors by file name."""
    names = dual.family.twin_names
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(decoder_layers(dual.base)):
        if any(isinstance(getattr(dual.family.module_of(layer, n), n), Twin) for n in dual.family.mlp_names):
            raise CheckpointError(
                f"layer {index} of this view has twins in its MLP, and vLLM's layers have a place for those of "
                "attention only: serve it with `orthrus serve`."
            )
        attention = layer.get_submodule("self_attn")
        if not any(isinstance(getattr(attention, name, None), Twin) for name in names):
            continue
        layers.append(index)
        for name in names:
            module = getattr(attention, name, None)
            if isinstance(module, nn.Module) and not isinstance(module, nn.Identity):
                path = f"model.layers.{index}.self_attn.{name}.diffusion"
                tensors |= {to_file(f"{path}.{part}"): t for part, t in _full(module).items()}
    tensors |= {
        name: tensor
        for name, tensor in view_tensors(dual).items()
        if name == MASK_EMBEDDING_NAME or name.startswith(REPAIR_PREFIX)
    }
    every = len(layers) == len(list(decoder_layers(dual.base)))
    config = replace(
        dual.config,
        layers=None if every else tuple(layers),
        twins=None,
        rank=None,
        rank_scale=1.0,
        encoding="full",
    )
    return config, tensors


def _full(module: nn.Module) -> dict[str, Tensor]:
    """Weight and bias of a projection's (or norm's) diffusion side, as of an ordinary one."""
    if not isinstance(module, Twin):
        return _parameters(module)
    if not isinstance(module, LowRankTwin):
        return _parameters(module.diffusion)
    found = _parameters(module.ar)
    part = module.diffusion
    assert isinstance(part, LowRank), "a low-rank twin without a low-rank side"
    product = part.up.weight.detach().float() @ part.down.weight.detach().float()
    weight = found["weight"]
    added = (weight.float() + part.scale * product.to(weight.device, torch.float32)).to(weight.dtype)
    return found | {"weight": added.cpu().contiguous()}


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    # Clones: a copy of an AR projection must not share memory with it, or safetensors refuses to write both.
    return {name: p.detach().cpu().clone().contiguous() for name, p in module.named_parameters()}
