"""Nothing is left on the CPU: decoding and training on tensors that say they lie on a GPU.

What this cannot show, for want of a device: gradients, since autograd asks a device for its stream, and with them the
losses, which take theirs in the forward pass; FlexAttention and its masks, which are compiled for one; autocast,
which a build without CUDA switches off; experts, whose rows are counted by an operation that a CPU has not; fused
optimizer steps; what several processes send; kernels' own limits of shape and type.
"""

from typing import Any

import pytest
import torch
from tests.engines import decode
from tests.packed import pack
from tests.pretend_cuda import Pretended, place, pretended_cuda
from tests.tiny import FAMILY_CONFIGS, tiny_dual, tiny_prompt

from orthrus.config import STRATEGIES, DecodeConfig, SamplingParams, Strategy
from orthrus.engine import round as engine_round
from orthrus.model.dual_view import DualView
from orthrus.training.blocks import BlockLayout, draw_blocks
from orthrus.training.corpus import Sample
from orthrus.training.forward import Objective, TrainingPass
from orthrus.training.losses import position_weights

PROMPT = tiny_prompt(70)
SAMPLED = SamplingParams(
    temperature=0.8, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=5, logit_bias={7: 1.0}
)


def assert_same_text(name: str, config: DecodeConfig, **variant: Any) -> None:
    """The tokens of the CPU, and as many accepted drafts; the prompt goes in by chunks."""
    variant = {"disturb": 0.1} | variant
    expected = decode(tiny_dual(name, **variant), PROMPT, config)
    with pretended_cuda():
        dual = tiny_dual(name, **variant)
        place(dual.base)
        place(dual)
        assert dual.device.type == "cuda"
        found = decode(dual, PROMPT, config)
    assert found.token_ids == expected.token_ids
    if config.strategy != "auto":
        assert found.stats.num_accepted == expected.stats.num_accepted


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy(strategy: Strategy, sampling: SamplingParams) -> None:
    config = DecodeConfig(max_new_tokens=12, strategy=strategy, sampling=sampling, logprobs=2)
    assert_same_text("llama", config)


@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS.keys() - {"qwen3-moe"}))
def test_every_family(name: str) -> None:
    assert_same_text(name, DecodeConfig(max_new_tokens=6, strategy="fused_tree"))


@pytest.mark.parametrize("variant", [{"mask_token_id": None, "rank": 3}, {"repair_rank": 4}], ids=str)
def test_other_kinds_of_views(variant: dict[str, Any]) -> None:
    assert_same_text("qwen3", DecodeConfig(max_new_tokens=8, strategy="chain"), **variant)


def test_half_precision() -> None:
    dual = tiny_dual("llama", disturb=0.1)
    dual.base.bfloat16()
    with pretended_cuda():
        place(dual.base)
        assert len(decode(dual, PROMPT, DecodeConfig(max_new_tokens=8, strategy="tree")).token_ids) == 8


def test_a_tensor_left_on_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    join = engine_round.join
    monkeypatch.setattr(engine_round, "join", lambda parts, _device: join(parts, "cpu"))
    with pytest.raises(RuntimeError, match="two devices"):
        assert_same_text("llama", DecodeConfig(max_new_tokens=4, strategy="chain"))


@torch.no_grad()
def hidden_states(dual: DualView, device: str, layout: BlockLayout) -> list[torch.Tensor]:
    """Of both passes of a training step: the AR rows', and the block rows' after blocks have moved."""
    samples = [
        Sample(tuple(tiny_prompt(7, seed)), tuple(tiny_prompt(length, seed + 50)), "test")
        for seed, length in enumerate((14, 11, 19, 9))
    ]
    training = TrainingPass(dual, Objective(), "dense")
    batch = draw_blocks(pack(samples, 48)[:2], [0, 1], 6, layout).to(device)
    context, teacher_BTC = training.teacher(batch)
    batch, context = training.moved(batch, context)
    weight_BNJ = position_weights("dpace", batch.valid_BNJ.float(), batch.valid_BNJ)
    found = [teacher_BTC, training.dual.head(training.blocks(batch, context)), weight_BNJ]
    return [t.inner if isinstance(t, Pretended) else t for t in found]


@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS.keys() - {"qwen3-moe"}))
def test_the_passes_of_a_training_step(name: str) -> None:
    layout = BlockLayout(block_size=5, rejected_share=0.5)
    variant: dict[str, Any] = {"block_size": 5, "disturb": 0.2, "repair_rank": 3, "mask_token_id": None}
    expected = hidden_states(tiny_dual(name, **variant), "cpu", layout)
    with pretended_cuda():
        dual = tiny_dual(name, **variant)
        place(dual.base)
        place(dual)
        found = hidden_states(dual, "cuda:0", layout)
    for there, here in zip(found, expected, strict=True):
        torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-4)
