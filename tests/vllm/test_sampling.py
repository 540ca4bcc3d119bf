"""Sampled text has the model's own distribution: thousands of draws against an enumeration, with a tiny vocabulary."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.integrations.vllm.names import engine_arguments

pytestmark = pytest.mark.families
NUM_DRAWS = 4000


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Of Pearson's statistic, cells with few expected draws pooled."""
    expected = probs.flatten().double() * counts.sum()
    counts = counts.flatten().double()
    large = expected >= 8
    seen = torch.cat([counts[large], counts[~large].sum()[None]])
    wanted = torch.cat([expected[large], expected[~large].sum()[None]]).clamp_min(1e-9)
    if wanted[-1] < 1.0:
        seen, wanted = seen[:-1], wanted[:-1]
    statistic = ((seen - wanted).square() / wanted).sum()
    degrees = torch.tensor((len(seen) - 1) / 2, dtype=torch.double)
    return float(torch.special.gammaincc(degrees, statistic / 2))


def warmer(probs: Tensor) -> Tensor:
    """The distribution at a slightly higher temperature, from which a wrong sampler might draw."""
    flat = (probs.double().clamp_min(1e-30).log() / 1.2).flatten().softmax(-1)
    return flat.reshape(probs.shape)


def test_sampled_tokens_are_drawn_from_the_models_own_distribution(families: Path, run: Any) -> None:
    enumerated = json.loads((families / "distribution.json").read_text())
    distributions = [torch.tensor(probs) for probs in enumerated["probs"]]
    prompt = json.loads((families / "families.json").read_text())["qwen3"]["prompts"][0]
    sampling = {
        "temperature": enumerated["temperature"],
        "max_tokens": 4,
        "ignore_eos": True,
        "detokenize": False,
    }
    options = {"enforce_eager": True, "max_model_len": 256, "block_size": 32, "max_num_seqs": 64}
    rounds = [{"prompts": [prompt] * NUM_DRAWS, "sampling": sampling}]
    found = run(families / "qwen3" / "vllm", rounds, **options, **engine_arguments(7, adaptive=False))
    found = found["rounds"][0]
    # On a CPU vLLM verifies drafts of sampled text wrongly (see cpu.py), so there are none.
    assert found["counters"].get("vllm:spec_decode_num_drafts", 0) == 0
    ids_N4 = torch.tensor([ids for (ids,) in found["token_ids"]])
    size = len(distributions[0])
    counts = [
        torch.bincount(ids_N4[:, 0], minlength=size),
        torch.bincount(ids_N4[:, 0] * size + ids_N4[:, 1], minlength=size**2),
        torch.bincount(ids_N4[:, 1] * size + ids_N4[:, 2], minlength=size**2),
    ]
    assert min(p_value(c, probs) for c, probs in zip(counts, distributions, strict=True)) > 1e-3
    # The test has power: it detects a slightly higher temperature.
    assert p_value(counts[2], warmer(distributions[2])) < 1e-6
