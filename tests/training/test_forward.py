"""The training pass and the decoding pass are the same function: else validation is good and serving dead."""

import pytest
import torch
from tests.packed import pack
from tests.rows import Rows
from tests.tiny import FAMILY_CONFIGS, VARIANTS, tiny_dual, tiny_prompt, variant_of

from orthrus.model.passes import block
from orthrus.training.blocks import BlockLayout, draw_blocks
from orthrus.training.corpus import Sample
from orthrus.training.forward import Objective, TrainingPass

LAYOUT = BlockLayout(block_size=5)


def _sequences(sequence_length=48):
    samples = [
        Sample(tuple(tiny_prompt(7, seed)), tuple(tiny_prompt(length, seed + 50)), "test")
        for seed, length in enumerate((14, 11, 19, 9))
    ]
    return pack(samples, sequence_length)


@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS))
@pytest.mark.parametrize("mask_token_id", [60, None], ids=["mask token", "mask embedding"])
def test_training_blocks_equal_decoding_blocks(name, mask_token_id):
    assert_training_equals_decoding(tiny_dual(name, block_size=5, disturb=0.3, mask_token_id=mask_token_id))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "all"])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3-sliding", "phi3", "gemma3"])
def test_training_blocks_equal_decoding_blocks_in_views_of_every_kind(name, variant):
    assert_training_equals_decoding(tiny_dual(name, block_size=5, disturb=0.3, **variant_of(name, variant)))


def assert_training_equals_decoding(dual):
    training = TrainingPass(dual, Objective())
    batch = draw_blocks(_sequences(), [0, 1], 6, LAYOUT)
    with torch.no_grad():
        context, _ = training.teacher(batch)
        logits_BNKV = training.dual.head(training.blocks(batch, context))
    for b, anchors in enumerate(batch.anchor_BN.tolist()):
        for n, anchor in enumerate(anchors):
            start = int((batch.document_BT[b] == batch.document_BT[b, anchor]).nonzero()[0])
            rows = Rows(dual)
            rows.feed(batch.token_ids_BT[b, start:anchor].tolist())
            decoded_KV = rows.logits(block(int(batch.token_ids_BT[b, anchor]), 5, dual.mask_token_id))
            torch.testing.assert_close(logits_BNKV[b, n, :4], decoded_KV[:4], atol=2e-4, rtol=2e-4)


def test_teacher_rows_equal_the_stock_forward_on_each_document():
    dual = tiny_dual("qwen3-sliding")
    training = TrainingPass(dual, Objective())
    batch = draw_blocks(_sequences(), [0, 1], 4, LAYOUT)
    with torch.no_grad():
        hidden_BTC = training.teacher(batch)[1]
        for b in range(2):
            for document in range(int(batch.document_BT[b].max()) + 1):
                inside = batch.document_BT[b] == document
                stock = dual.stock()
                expected = stock(batch.token_ids_BT[b][inside][None]).logits[0]
                torch.testing.assert_close(
                    training.dual.head(hidden_BTC[b][inside]), expected, atol=2e-4, rtol=2e-4
                )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_only_the_view_gets_gradients(name, variant):
    dual = tiny_dual(name, disturb=0.2, **{"mask_token_id": None, **variant_of(name, variant)})
    before = {name: p.clone() for name, p in dual.base.named_parameters() if ".diffusion." not in name}
    output = TrainingPass(dual, Objective())(draw_blocks(_sequences(), [0, 1], 6, LAYOUT))
    output.loss.backward()
    view = dual.view_parameters()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in view.values())
    frozen = {name: p for name, p in dual.base.named_parameters() if ".diffusion." not in name}
    assert frozen
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in frozen.items())
