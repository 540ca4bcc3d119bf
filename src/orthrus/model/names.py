"""Our names in checkpoints, and the only table between module names of twins and tensor names in files.

The released Orthrus-Qwen3 layout keeps the base's own names. Each diffusion tensor has the name of its AR twin with
`_diff` after the module's name. Our merged folders and view files use the same names. There, the factors of a low-rank
twin are `q_proj_diff.down.weight` and `q_proj_diff.up.weight`.
"""

from collections.abc import Mapping

MODEL_TYPE = "orthrus"
ARCHITECTURE = "OrthrusForCausalLM"

TWIN_MODULES = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "q_norm", "k_norm"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)

TO_FILE: Mapping[str, str] = {f"{module}.diffusion": f"{module}_diff" for module in TWIN_MODULES}
FROM_FILE: Mapping[str, str] = {file: ours for ours, file in TO_FILE.items()}

MASK_EMBEDDING_NAME = "mask_embedding"
REPAIR_PREFIX = "repair."


def to_file(name: str) -> str:
    """`layers.0.self_attn.q_proj.diffusion.weight` -> `layers.0.self_attn.q_proj_diff.weight`."""
    return _rename(name, TO_FILE)


def from_file(name: str) -> str:
    """The inverse of `to_file`. Names that do not belong to a view stay as they are."""
    return _rename(name, FROM_FILE)


def is_view_tensor(name: str) -> bool:
    """Whether a tensor of a checkpoint file belongs to the view. All others are the base's."""
    return name == MASK_EMBEDDING_NAME or name.startswith(REPAIR_PREFIX) or from_file(name) != name


def _rename(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        head, found, tail = name.partition(f".{old}.")
        if found:
            return f"{head}.{new}.{tail}"
    return name
