"""Quantised model folders as users have them, made by transformers and the quantisation library itself."""

from pathlib import Path
from typing import Any

import torch
from tests.folders import letter_tokenizer
from transformers import AutoModelForCausalLM, TorchAoConfig

KINDS = {
    "int8 weights": "torchao Int8WeightOnly",
    "int8 weights and activations": "torchao Int8DynamicActivationInt8Weight",
    "int4 weights": "torchao IntxWeightOnly int4",
}
"""What is tried, and what Orthrus calls it. torchao's Int4WeightOnly has no code for CPUs."""


def _torchao(kind: str) -> TorchAoConfig:
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )

    made: dict[str, Any] = {
        "int8 weights": Int8WeightOnlyConfig,
        "int8 weights and activations": Int8DynamicActivationInt8WeightConfig,
        "int4 weights": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
    }
    return TorchAoConfig(made[kind]())


def save_quantised(base: Path, folder: Path, kind: str | None = None, config: Any = None) -> Path:
    """The quantised sibling of a base's folder; `config` for methods other than torchao's kinds."""
    model = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=config or _torchao(str(kind)),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder
