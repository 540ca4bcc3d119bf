"""Block attention three ways: the dense code, FlexAttention, and a full softmax from the definition."""

import pytest
import torch
from tests.packed import pack
from tests.tiny import FAMILY_CONFIGS, tiny_dual, tiny_prompt

from orthrus.base.families import layer_windows
from orthrus.errors import UserInputError
from orthrus.training import block_attention, flex_blocks
from orthrus.training.blocks import BlockBatch, BlockLayout, draw_blocks
from orthrus.training.corpus import Sample
from orthrus.training.flex_blocks import check_attention, pick_attention
from orthrus.training.forward import Objective, TrainingPass

# Uncompiled FlexAttention says that it is slow, which is why nobody trains with it.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
LAYOUT = BlockLayout(block_size=5)


def batch_of(num_anchors: int = 6) -> BlockBatch:
    """Two sequences of two dialogues each, padded at the end; windows of 12 cut their histories."""
    samples = [
        Sample(tuple(tiny_prompt(7, seed)), tuple(tiny_prompt(length, seed + 50)), "test")
        for seed, length in enumerate((24, 11, 19, 9))
    ]
    sequences = pack(samples, 50)
    assert len(sequences) == 2
    return draw_blocks(sequences, [0, 1], num_anchors, LAYOUT)


def full_mask(batch: BlockBatch, window: int | None) -> torch.Tensor:
    """Row by row, as section 3 of arXiv 2605.12825 has it: history before the anchor, and the own block."""
    num_rows, size = batch.token_ids_BT.shape[1], batch.layout.block_size
    num_queries = batch.anchor_BN.shape[1] * size
    visible = torch.zeros(len(batch.token_ids_BT), num_queries, num_rows + num_queries, dtype=torch.bool)
    for b, anchors in enumerate(batch.anchor_BN.tolist()):
        documents, positions = batch.document_BT[b].tolist(), batch.position_ids_BT[b].tolist()
        for n, anchor in enumerate(anchors):
            for k in range(size):
                for t in range(anchor):
                    far = positions[anchor] + k - positions[t]
                    near = window is None or far < window
                    visible[b, n * size + k, t] = near and documents[t] == documents[anchor]
                own = num_rows + n * size
                visible[b, n * size + k, own : own + size] = True
    return visible


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", ["llama", "qwen3-sliding"])
def test_all_three_attend_alike(name: str, softcap: float | None) -> None:
    dual, batch = tiny_dual(name, block_size=5), batch_of()
    config = dual.base.config
    contexts = [TrainingPass(dual, Objective(), kind).teacher(batch)[0] for kind in ("dense", "flex")]
    torch.manual_seed(0)
    heads, kv_heads, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        contexts[0].keys[0].shape[-1],
    )
    num_queries = batch.anchor_BN.shape[1] * 5
    query = torch.randn(2, heads, num_queries, dim)
    key, value = torch.randn(2, 2, kv_heads, num_queries, dim).unbind()
    for layer, window in enumerate(layer_windows(config)):
        module = torch.nn.Module()
        module.layer_idx = layer
        found = [
            attend(module, query, key, value, None, 0.4, softcap, block_context=context)[0]
            for attend, context in zip(
                (block_attention.block_attention, flex_blocks.flex_block_attention), contexts, strict=True
            )
        ]
        groups = heads // kv_heads
        keys = torch.cat([contexts[0].keys[layer], key], 2).repeat_interleave(groups, 1)
        values = torch.cat([contexts[0].values[layer], value], 2).repeat_interleave(groups, 1)
        scores = query @ keys.mT * 0.4
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~full_mask(batch, window)[:, None], -torch.inf)
        expected = (scores.softmax(-1) @ values).transpose(1, 2)
        for out in found:
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS))
def test_every_family_gives_the_same_hidden_states(name: str) -> None:
    dual, batch = tiny_dual(name, block_size=5, disturb=0.3), batch_of()
    hidden = []
    for kind in ("dense", "flex"):
        training = TrainingPass(dual, Objective(), kind)
        hidden.append(training.blocks(batch, training.teacher(batch)[0]))
    torch.testing.assert_close(hidden[1], hidden[0], atol=1e-5, rtol=1e-5)


def test_the_masks_of_a_batch_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = flex_blocks.create_block_mask
    monkeypatch.setattr(flex_blocks, "create_block_mask", lambda *a, **k: built.append(1) or build(*a, **k))
    for name, count in (("llama", 1), ("qwen3-sliding", 2)):
        built.clear()
        training = TrainingPass(tiny_dual(name, block_size=5), Objective(), "flex")
        context, _ = training.teacher(batch_of())
        with torch.no_grad():
            training.blocks(batch_of(), context)
        assert len(built) == count


def test_auto_and_what_cannot_train() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_attention("auto", cpu, 64) == pick_attention("dense", cuda, 64) == "dense"
    assert pick_attention("auto", cuda, 64) == pick_attention("flex", cpu, 64) == "flex"
    # The kernels take no smaller heads.
    assert pick_attention("auto", cuda, 8) == "dense"
    check_attention("auto", cpu)
    check_attention("flex", cuda)
    with pytest.raises(UserInputError, match="cannot train on cpu"):
        check_attention("flex", cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-sliding", "gemma2"])
def test_gradients_are_the_same_on_a_gpu(name: str, autocast: bool) -> None:
    dual, batch = tiny_dual(name, block_size=5, disturb=0.3).to("cuda"), batch_of(40).to("cuda")
    gradients = []
    for kind in ("dense", "flex"):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            output = TrainingPass(dual, Objective(), kind)(batch)
        output.loss.backward()
        parameters = dual.view_parameters()
        gradients.append({n: p.grad for n, p in parameters.items()})
        for parameter in parameters.values():
            parameter.grad = None
    for parameter, dense in gradients[0].items():
        error = (gradients[1][parameter] - dense).norm() / dense.norm()
        assert error < (0.05 if autocast else 2e-3), parameter
