"""Blocks that start where the view's own drafts are rejected: against loops, and through a whole run."""

from dataclasses import replace

import pytest
import torch
from tests.packed import pack
from tests.tiny import tiny_dual, tiny_prompt
from tests.training.test_trainer import CONFIG, run

from orthrus.errors import UserInputError
from orthrus.model.drafting import repaired
from orthrus.training.blocks import BlockLayout, draw_blocks, moving_blocks, rejected_anchors
from orthrus.training.corpus import Sample
from orthrus.training.forward import Objective, TrainingPass
from orthrus.training.recipe import TrainConfig
from orthrus.training.trainer import Hooks

LAYOUT = BlockLayout(block_size=5, first_target=1, rejected_share=0.5)
SEEDS = [3, 4]
NUM = 7


def packed_sequences(sequence_length=48):
    samples = [
        Sample(tuple(tiny_prompt(7, seed)), tuple(tiny_prompt(length, seed + 50)), "test")
        for seed, length in enumerate((14, 11, 19, 9))
    ]
    return pack(samples, sequence_length)


def expected_anchors(sequences, batch, is_hit):
    """By loops: each block's anchor, those that move where `is_hit(sequence, target)` first says no."""
    anchors = []
    for b, sequence in enumerate(sequences):
        answer = sequence.answer_T.tolist()
        found = []
        for n in range(NUM):
            anchor = int(batch.anchor_BN[b, n])
            if batch.draws.moving_BN[b, n]:
                for j in range(1, 4):
                    t = anchor + j
                    if t + 1 >= len(answer) or answer[t + 1] != answer[anchor]:
                        break
                    if not is_hit(b, t):
                        if t + 2 < len(answer) and answer[t + 2] == answer[anchor]:
                            anchor = t + 1
                        break
            found.append(anchor)
        anchors.append(sorted(found))
    return anchors


@pytest.mark.parametrize("hits", ["none", "all", "some"])
def test_moving_blocks_go_to_the_first_token_that_was_wrong(hits):
    sequences = packed_sequences()
    batch = draw_blocks(sequences, SEEDS, NUM, LAYOUT)
    assert batch.draws.moving_BN.sum(1).tolist() == [4, 4]
    share = {"none": -1.0, "all": 2.0, "some": 0.6}[hits]
    hit_BT = torch.rand(batch.token_ids_BT.shape, generator=torch.Generator().manual_seed(0)) < share
    probed = moving_blocks(batch)
    hit_BMJ = hit_BT.gather(1, probed.target_BNJ.flatten(1)).view_as(probed.target_BNJ)
    moved = rejected_anchors(batch, hit_BMJ)
    assert moved.anchor_BN.tolist() == expected_anchors(sequences, batch, lambda b, t: bool(hit_BT[b, t]))
    if hits == "all":
        assert torch.equal(moved.anchor_BN, batch.anchor_BN)
    else:
        assert not torch.equal(moved.anchor_BN, batch.anchor_BN)


def test_without_a_share_nothing_moves_and_the_draws_are_as_they_were():
    sequences = packed_sequences()
    plain = draw_blocks(sequences, SEEDS, NUM, replace(LAYOUT, rejected_share=0.0))
    batch = draw_blocks(sequences, SEEDS, NUM, LAYOUT)
    assert torch.equal(plain.anchor_BN, batch.anchor_BN)
    assert torch.equal(plain.valid_BNJ, batch.valid_BNJ)
    assert not plain.draws.moving_BN.any()


@pytest.mark.parametrize("repair_rank", [None, 3])
def test_the_drafts_that_are_looked_at_are_the_views_own(repair_rank):
    dual = tiny_dual(block_size=5, disturb=0.3, mask_token_id=None, repair_rank=repair_rank)
    training = TrainingPass(dual, Objective())
    batch = draw_blocks(packed_sequences(), SEEDS, NUM, LAYOUT)
    context, _ = training.teacher(batch)
    moved, _ = training.moved(batch, context)
    # Every block as it was drawn, through the losses: at a hit, the text's own token was the most probable.
    with torch.no_grad():
        hidden_BNJC = training.blocks(batch, context)[:, :, :-1]
        previous_BNJ = batch.token_ids_BT.gather(1, batch.target_BNJ.flatten(1))
        if dual.repair is not None:
            hidden_BNJC = repaired(dual, hidden_BNJC.flatten(0, 2), previous_BNJ.flatten()).view_as(
                hidden_BNJC
            )
        guesses_BNJ = dual.head(hidden_BNJC).argmax(-1)
    guess_of = {}
    for b, n in batch.draws.moving_BN.nonzero().tolist():
        for j in range(1, 4):
            guess_of[b, int(batch.anchor_BN[b, n]), j] = int(guesses_BNJ[b, n, j])

    sequences, tokens = packed_sequences(), batch.token_ids_BT.tolist()
    anchors = []
    for b, sequence in enumerate(sequences):
        answer, found = sequence.answer_T.tolist(), []
        for n in range(NUM):
            anchor = int(batch.anchor_BN[b, n])
            if batch.draws.moving_BN[b, n]:
                for j in range(1, 4):
                    t = anchor + j
                    if t + 1 >= len(answer) or answer[t + 1] != answer[anchor]:
                        break
                    if guess_of[b, anchor, j] != tokens[b][t + 1]:
                        if t + 2 < len(answer) and answer[t + 2] == answer[anchor]:
                            anchor = t + 1
                        break
            found.append(anchor)
        anchors.append(sorted(found))
    assert moved.anchor_BN.tolist() == anchors


def test_the_look_at_drafts_keeps_no_weight_from_learning():
    dual = tiny_dual(block_size=5, disturb=0.3, mask_token_id=None)
    with torch.autocast("cpu", torch.bfloat16):
        TrainingPass(dual, Objective())(draw_blocks(packed_sequences(), SEEDS, NUM, LAYOUT)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dual.view_parameters().values())


def test_a_run_that_learns_from_rejected_drafts_resumes_bit_for_bit(tmp_path):
    config = replace(CONFIG, steps=6, first_target=1, rejected_share=0.5)
    whole, _ = run(tmp_path, "whole", config)
    plain, _ = run(tmp_path, "plain", replace(config, rejected_share=0.0))
    run(tmp_path, "parts", config, hooks=Hooks(should_stop=iter([False, False, True]).__next__))
    resumed, state = run(tmp_path, "parts", config)
    assert state.step == 6
    for name, parameter in resumed.view_parameters().items():
        assert torch.equal(parameter, whole.view_parameters()[name]), name
    assert any(not torch.equal(p, plain.view_parameters()[n]) for n, p in whole.view_parameters().items())


def test_a_share_that_is_none_is_refused():
    with pytest.raises(UserInputError, match=r"rejected_share must lie between 0 and 1, not 1.5"):
        TrainConfig(rejected_share=1.5)
