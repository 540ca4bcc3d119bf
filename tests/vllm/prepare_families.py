"""Tiny random models of each family with a disturbed view, exported, and what our own engine does with them.

python -m tests.vllm.prepare_families FOLDER; in the environment of Orthrus.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tests.folders import letter_tokenizer
from tests.tiny import COMMON, VOCAB, disturb_view, random_model
from tests.vllm.prepare import oracle_of
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from orthrus.api import Orthrus
from orthrus.base.loading import Base, load_base
from orthrus.base.resolve import resolve
from orthrus.integrations.vllm.export import export_vllm
from orthrus.model.checkpoint import untrained_view
from orthrus.model.merged import save_merged

# Heads of 32, the smallest that vLLM's attention on a CPU takes.
SHAPE: dict[str, Any] = COMMON | {"hidden_size": 128, "intermediate_size": 96}
# Name: the base's config, options of the untrained view, and whether to write the released layout.
CASES: dict[str, tuple[PreTrainedConfig, dict[str, Any], bool]] = {
    "llama": (LlamaConfig(**SHAPE, attention_bias=True), {"mask": "trained"}, False),
    "llama-rank-4-of-one-layer": (LlamaConfig(**SHAPE), {"rank": 4, "layers": [1]}, False),
    "qwen2": (Qwen2Config(**SHAPE), {"twins": ["q_proj", "k_proj"]}, False),
    "qwen3": (Qwen3Config(**SHAPE, head_dim=32), {}, False),
    "qwen3-released": (Qwen3Config(**SHAPE, head_dim=32), {}, True),
    "mistral": (MistralConfig(**SHAPE, sliding_window=None), {}, False),
}
NEW_TOKENS = 40
# Of the sampling test: the tiny models are nearly sure of each token, and vLLM allows no more.
TEMPERATURE = 2.0


def bare(folder: Path) -> Base:
    return load_base(resolve(str(folder)), device="cpu")


def exact_distribution(base: Base, prompt: list[int]) -> list[Tensor]:
    """Probabilities of the first three sampled tokens at `TEMPERATURE`: (V,) of the first, (V, V) of the first two and
    (V, V) of the second and the third, by trying every beginning."""
    ids_V = torch.arange(VOCAB)

    def next_probs(rows_BT: Tensor) -> Tensor:
        return (base.model(rows_BT).logits[:, -1].double() / TEMPERATURE).softmax(-1)

    with torch.inference_mode():
        first_V = next_probs(torch.tensor([prompt]))[0]
        rows = torch.cat([torch.tensor(prompt).expand(VOCAB, -1), ids_V[:, None]], dim=1)
        second_VV = first_V[:, None] * next_probs(rows)
        pairs_VV = torch.zeros(VOCAB, VOCAB, dtype=torch.double)
        for first in range(VOCAB):
            start = torch.tensor([*prompt, first]).expand(VOCAB, -1)
            rows = torch.cat([start, ids_V[:, None]], dim=1)
            third_VV = next_probs(rows)
            pairs_VV += second_VV[first][:, None] * third_VV
    return [first_V, second_VV, pairs_VV]


def main(folder: Path) -> None:
    oracle = {}
    for name, (config, options, is_released) in CASES.items():
        place = folder / name
        random_model(config, seed=1).save_pretrained(place / "base")
        letter_tokenizer().save_pretrained(place / "base")
        base = bare(place / "base")
        dual = untrained_view(base, **options)
        disturb_view(dual, 0.15)
        if is_released:
            save_merged(dual, base, place / "vllm", "released")
        else:
            export_vllm(dual, base, place / "vllm")
        orthrus = Orthrus(base, dual)
        prompts = ["the cat sat", "a long walk home in the rain. and so", "Ulm", "What, no?"]
        oracle[name] = oracle_of(orthrus, prompts, NEW_TOKENS, raw=True)
        if name == "qwen3":
            distribution = exact_distribution(base, oracle[name]["prompts"][0])
            (folder / "distribution.json").write_text(
                json.dumps({"temperature": TEMPERATURE, "probs": [p.tolist() for p in distribution]})
            )
    (folder / "families.json").write_text(json.dumps(oracle))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
