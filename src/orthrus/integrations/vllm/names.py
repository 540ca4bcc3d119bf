"""What the parts of this integration are called where vLLM wants a name, and the arguments that name them."""

import json
from typing import Any

from orthrus.errors import UnsupportedModelError

PACKAGE = "orthrus.integrations.vllm"
CONFIG_KEY = "orthrus"
"""Where config.json keeps the view's settings, and vLLM's `additional_config` ours."""

_FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral")
# The released layout is a Qwen3 model.
MODELS = {f"Orthrus{family}ForCausalLM": f"Orthrus{family}" for family in _FAMILIES} | {
    "OrthrusLM": "OrthrusQwen3"
}
"""Architectures of config.json, and our classes."""


def architecture_of(family: str) -> str:
    """What config.json calls a model of that family; UnsupportedModelError for one that we have no class for."""
    if family not in _FAMILIES:
        raise UnsupportedModelError(
            f"the vLLM integration holds {', '.join(_FAMILIES)}, not {family}: serve it with `orthrus serve`."
        )
    return f"Orthrus{family}ForCausalLM"


def engine_arguments(
    num_drafts: int, device: str = "cpu", *, floor: bool = True, adaptive: bool = True
) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` that turn drafting on.

    num_drafts: tokens that a cycle may draft, at most the view's block size less one. device: "cpu" or "cuda".
    floor: the draft pass also carries the anchor as an AR row, whose token becomes the first draft. adaptive:
    draft fewer tokens, or none, where that is faster.
    """
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": f"{PACKAGE}.proposer.OrthrusProposer",
            "num_speculative_tokens": num_drafts,
        },
        "worker_cls": f"{PACKAGE}.{'cpu.OrthrusCPUWorker' if device == 'cpu' else 'gpu.OrthrusGPUWorker'}",
        "scheduler_cls": f"{PACKAGE}.scheduler.OrthrusScheduler",
        "additional_config": {CONFIG_KEY: {"floor": floor, "adaptive": adaptive}},
    }


def command_line(
    num_drafts: int, device: str = "cpu", *, floor: bool = True, adaptive: bool = True
) -> list[str]:
    """The same as options of `vllm serve`."""
    arguments = engine_arguments(num_drafts, device, floor=floor, adaptive=adaptive)
    words = []
    for name, value in arguments.items():
        words += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    return words
