"""Block layouts against a slow oracle: one block at a time, straight from the definition."""

import math
from dataclasses import replace

import pytest
import torch
from tests.packed import pack
from tests.rows import Rows
from tests.tiny import tiny_dual, tiny_prompt
from tests.training.test_trainer import CONFIG, run

from orthrus.errors import UserInputError
from orthrus.model.passes import block
from orthrus.training.blocks import BlockLayout, draw_blocks
from orthrus.training.corpus import Sample
from orthrus.training.forward import Objective, TrainingPass
from orthrus.training.recipe import TrainConfig
from orthrus.training.recipe_file import load_recipe
from orthrus.training.trainer import Hooks

LAYOUTS = {
    "anchor": BlockLayout(block_size=5),
    "two clean": BlockLayout(block_size=5, num_clean=2, first_target=1),
    "two clean, all weighed": BlockLayout(block_size=5, num_clean=2),
    "three clean, some blocks": BlockLayout(block_size=5, num_clean=3, first_target=2, clean_share=0.5),
    "late target": BlockLayout(block_size=5, first_target=3),
    "revealed": BlockLayout(block_size=6, reveal=0.4),
    "all at once": BlockLayout(block_size=4, num_clean=2, first_target=1, clean_share=0.6, reveal=0.3),
}
SEEDS = [11, 12]


def packed_sequences(sequence_length=48):
    samples = [
        Sample(tuple(tiny_prompt(7, seed)), tuple(tiny_prompt(length, seed + 50)), "test")
        for seed, length in enumerate((14, 11, 19, 9))
    ]
    return pack(samples, sequence_length)


def oracle(dual, sequences, seeds, num_anchors, layout, weights):
    """(loss, weight) summed over every block: a decode of its own, a sum over its rows."""
    loss = weight = 0.0
    for sequence, seed in zip(sequences, seeds, strict=True):
        # The draws, in the order that makes anchors the same whatever the layout.
        generator = torch.Generator().manual_seed(seed)
        document, tokens = sequence.document_T.tolist(), sequence.token_ids_T.tolist()
        answer = sequence.answer_T.tolist()
        candidates = [t for t in range(len(tokens) - 1) if answer[t] >= 0 and answer[t + 1] == answer[t]]
        order = torch.randperm(len(candidates), generator=generator)[:num_anchors].tolist()
        anchors = sorted(candidates[i] for i in order)
        clean = (torch.rand(num_anchors, generator=generator) < layout.clean_share).tolist()
        shown = (torch.rand(num_anchors, layout.block_size, generator=generator) < layout.reveal).tolist()
        for n, anchor in enumerate(anchors):
            start = document.index(document[anchor])
            end = len(document) - document[::-1].index(document[anchor])
            num_clean, first_target = (layout.num_clean, layout.first_target) if clean[n] else (1, 0)
            ids = [
                tokens[anchor + k]
                if (k < num_clean or shown[n][k]) and anchor + k < end
                else dual.mask_token_id
                for k in range(layout.block_size)
            ]
            decoding = Rows(dual)
            decoding.feed(tokens[start:anchor])
            part = replace(block(ids[0], layout.block_size, dual.mask_token_id), token_ids=ids)
            log_q_JV = decoding.logits(part).log_softmax(-1)
            model = dual.stock()
            log_p_TV = model(torch.tensor([tokens[start:end]])).logits[0].log_softmax(-1)
            targets = [j for j in range(first_target, layout.block_size - 1) if anchor + j + 1 < end]
            chances = {
                j: 0.5
                + 0.5 * torch.minimum(log_p_TV[anchor - start + j].exp(), log_q_JV[j].exp()).sum().item()
                for j in targets
            }
            for j in targets:
                log_p_V = log_p_TV[anchor - start + j]
                kl = (log_p_V.exp() * (log_p_V - log_q_JV[j])).sum().item()
                importance = 1.0
                if weights == "dpace":
                    importance = sum(
                        math.prod(chances[i] for i in targets if i <= m) for m in targets if m >= j
                    )
                elif weights == "decay":
                    importance = math.exp(-j / 4.0)
                loss, weight = loss + importance * kl, weight + importance
    return loss, weight


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("weights", ["dpace", "decay", "uniform"])
def test_the_loss_is_that_of_the_definition(layout, weights):
    dual = tiny_dual(block_size=layout.block_size, disturb=0.3, mask_token_id=None)
    sequences = packed_sequences()
    batch = draw_blocks(sequences, SEEDS, 7, layout)
    with torch.no_grad():
        output = TrainingPass(dual, Objective(weights=weights))(batch)
        loss, weight = oracle(dual, sequences, SEEDS, 7, layout, weights)
    assert weight > 0
    assert float(output.weight) == pytest.approx(weight, rel=1e-4)
    assert float(output.loss) == pytest.approx(loss, rel=1e-4)


def test_anchors_are_the_same_in_every_layout():
    """Those that seeds gave before there were layouts."""
    sequences = packed_sequences()
    for layout in LAYOUTS.values():
        batch = draw_blocks(sequences, SEEDS, 7, layout)
        for sequence, seed, anchors in zip(sequences, SEEDS, batch.anchor_BN, strict=True):
            follows = (sequence.answer_T[:-1] >= 0) & (sequence.answer_T[1:] == sequence.answer_T[:-1])
            candidates = follows.nonzero()[:, 0]
            order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))[:7]
            assert torch.equal(anchors, candidates[order].sort().values)


def test_shares_are_kept_and_sequences_do_not_hang_on_each_other():
    sequences = [*packed_sequences()] * 40
    seeds = list(range(len(sequences)))
    layout = BlockLayout(block_size=6, num_clean=3, clean_share=0.3, reveal=0.25)
    batch = draw_blocks(sequences, seeds, 12, layout)
    whole = batch.valid_BNJ.all(-1)
    assert batch.known_BNK[..., 0].all()
    # Row 1 is known in clean blocks, and in the share of the others that shows its token.
    known_K = batch.known_BNK[whole].float().mean(0)
    expected = torch.tensor([1.0, *[0.3 + 0.7 * 0.25] * 2, *[0.25] * 3])
    torch.testing.assert_close(known_K, expected, atol=0.06, rtol=0)
    alone = draw_blocks(sequences[3:4], seeds[3:4], 12, layout)
    assert torch.equal(alone.known_BNK[0], batch.known_BNK[3])
    again = draw_blocks(sequences, seeds, 12, layout)
    assert torch.equal(again.known_BNK, batch.known_BNK)


def test_a_run_with_a_layout_resumes_bit_for_bit(tmp_path):
    config = replace(
        CONFIG, steps=6, num_clean=2, first_target=1, clean_share=0.5, reveal=0.2, rank=3, mask="trained"
    )
    made = {"block_size": 5, "mask_token_id": None, "rank": 3}
    whole, _ = run(tmp_path, "whole", config, dual=tiny_dual(**made))
    calls = iter([False, False, True])
    _, state = run(tmp_path, "parts", config, Hooks(should_stop=lambda: next(calls)), dual=tiny_dual(**made))
    assert state.step == 3
    resumed, _ = run(tmp_path, "parts", config, dual=tiny_dual(**made))
    plain, _ = run(tmp_path, "plain", replace(CONFIG, steps=6), dual=tiny_dual(**made))
    for name, parameter in resumed.view_parameters().items():
        assert torch.equal(parameter, whole.view_parameters()[name]), name
    assert any(not torch.equal(p, plain.view_parameters()[n]) for n, p in resumed.view_parameters().items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_clean: 0", r"num_clean must lie between 1 .* = 7, not 0"),
        ("num_clean: 8", "num_clean must lie between 1"),
        ("first_target: -1", "first_target must lie between 0 and 6"),
        ("first_target: 7", "the last target of blocks of 8, not 7"),
        ("clean_share: 1.5", "clean_share must lie between 0 and 1, not 1.5"),
        ("reveal: 1", "reveal must lie between 0 and below 1"),
        ("reveal: .nan", "reveal must be a number"),
        ("twins: q_proj", "twins must list different modules"),
        ("twins: [q_proj, q_proj]", "twins must list different modules"),
        ("rank: 0", "rank must be a positive number, not 0"),
        ("rank: full", "rank must be a positive number"),
        ("mask: -1", "mask must be auto, trained or a token id, not -1"),
        ("mask: true", "mask must be auto"),
        ("mask: learnt", "mask must be auto"),
        ("mask:", "mask has no value"),
        ("license: 2", "license must name a licence"),
    ],
)
def test_wrong_layouts_and_variants_are_refused_in_one_sentence(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserInputError, match=message) as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


def test_layouts_and_variants_are_read(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("num_clean: 2\nfirst_target: 1\nreveal: 0.1\ntwins: [q_proj, v_proj]\nrank: 4\nmask: 7\n")
    config = load_recipe(file, ["clean_share=0.5", "license=apache-2.0"])
    assert (config.num_clean, config.first_target, config.clean_share, config.reveal) == (2, 1, 0.5, 0.1)
    assert (config.twins, config.rank, config.mask) == (("q_proj", "v_proj"), 4, 7)
    assert config.license == "apache-2.0"
    assert load_recipe(file, ["mask=trained"]).mask == "trained"
    assert TrainConfig().mask == "auto"
