"""Training the repair head of a frozen view: what moves, what stays, and what it is worth."""

from dataclasses import replace

import pytest
import torch
from tests.engines import decode
from tests.folders import save_base
from tests.rows import Rows
from tests.tiny import tiny_dual
from tests.training.test_forward import LAYOUT, _sequences
from tests.training.test_trainer import CONFIG, own_answers, run

from orthrus.base.loading import load_base
from orthrus.base.resolve import resolve
from orthrus.config import DecodeConfig
from orthrus.errors import UserInputError
from orthrus.model.checkpoint import save_view, untrained_view
from orthrus.model.drafting import repaired
from orthrus.model.passes import block
from orthrus.training.blocks import draw_blocks
from orthrus.training.forward import Objective, TrainingPass
from orthrus.training.recipe import TrainConfig
from orthrus.training.start import starting_view
from orthrus.training.trainer import Hooks

REPAIR = replace(CONFIG, train="repair", init_view="elsewhere", repair_rank=16, loss="ce", weights="uniform")


def headed(seed=0):
    dual = tiny_dual(block_size=5, mask_token_id=None, disturb=0.1)
    dual.add_repair(16, seed)
    return dual


def accepted(dual, strategy):
    """Accepted drafts over the answers that `run` trains on."""
    total = 0
    for sample in own_answers(dual, 5, 20):
        config = DecodeConfig(max_new_tokens=20, strategy=strategy, node_budget=6)
        result = decode(dual, list(sample.prompt_ids), config)
        assert result.token_ids == sample.answer_ids
        total += result.stats.num_accepted / result.stats.num_cycles
    return total / 5


def test_a_head_that_knows_the_truth_raises_acceptance_and_leaves_the_twins_alone(tmp_path):
    config = replace(REPAIR, steps=100, num_anchors=19, batch_size=5, sequence_length=26)
    dual = headed()
    before = {name: p.clone() for name, p in dual.view_parameters().items()}
    was = {strategy: accepted(dual, strategy) for strategy in ("chain", "tree", "fused_tree")}
    run(tmp_path, "repair", config, dual=dual)
    for name, parameter in dual.view_parameters().items():
        assert torch.equal(parameter, before[name]) == (not name.startswith("repair.")), name
    for strategy, value in was.items():
        assert accepted(dual, strategy) > 1.3 * value + 0.2, strategy


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    whole, _ = run(tmp_path, "whole", REPAIR, dual=headed())
    calls = iter([False] * 4 + [True] * 20)
    run(tmp_path, "parts", REPAIR, hooks=Hooks(should_stop=lambda: next(calls)), dual=headed())
    # The resumed process starts from another head, which the saved one replaces.
    resumed, state = run(tmp_path, "parts", REPAIR, dual=headed(seed=1))
    assert state.step == REPAIR.steps
    for name, parameter in resumed.view_parameters().items():
        assert torch.equal(parameter, whole.view_parameters()[name]), name


def test_what_is_trained_is_part_of_the_recipe(tmp_path):
    run(tmp_path, "run", replace(REPAIR, steps=1), dual=headed())
    with pytest.raises(UserInputError, match="train"):
        run(tmp_path, "run", replace(REPAIR, steps=1, train="view"), dual=headed())


def test_a_whole_view_trains_together_with_its_head():
    dual = headed()
    dual.repair.out.weight.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    TrainingPass(dual, Objective())(draw_blocks(_sequences(), [0, 1], 6, LAYOUT)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dual.view_parameters().values())


def test_training_knows_the_same_parent_as_decoding():
    """The loss of a row is that of the repaired row, which decoding looks at for its best candidates."""
    dual = headed()
    dual.repair.out.weight.data.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(0))
    batch = draw_blocks(_sequences(), [0, 1], 1, LAYOUT)
    batch = replace(batch, token_ids_BT=batch.token_ids_BT[:1], position_ids_BT=batch.position_ids_BT[:1])
    batch = replace(batch, document_BT=batch.document_BT[:1], anchor_BN=batch.anchor_BN[:1])
    batch = replace(batch, target_BNJ=batch.target_BNJ[:1], known_BNK=batch.known_BNK[:1])
    batch = replace(batch, valid_BNJ=batch.valid_BNJ[:1])
    anchor, ids_T = int(batch.anchor_BN), batch.token_ids_BT[0]
    start = int((batch.document_BT[0] == batch.document_BT[0, anchor]).nonzero()[0])
    rows, expected = Rows(dual), 0.0
    with torch.no_grad():
        output = TrainingPass(dual, Objective(loss="ce", weights="uniform"))(batch)
        rows.feed(ids_T[start:anchor].tolist())
        hidden_KC = rows.hidden(block(int(ids_T[anchor]), 5, dual.mask_token_id))
        for j in batch.valid_BNJ[0, 0].nonzero()[:, 0].tolist():
            known = repaired(dual, hidden_KC[j], ids_T[anchor + j])
            expected -= float(dual.head(known).log_softmax(-1)[ids_T[anchor + j + 1]])
    assert float(output.weight) > 1
    assert float(output.loss) == pytest.approx(expected, rel=1e-4)


def test_a_view_gets_a_head_keeps_the_one_it_has_and_remembers_how_its_twins_were_made(tmp_path):
    folder = save_base(tmp_path / "base")

    def load():
        return load_base(resolve(str(folder)), device="cpu")

    view = untrained_view(load(), 6)
    view.config = replace(view.config, provenance={"recipe": {"seed": 5}})
    save_view(view, tmp_path / "plain")
    recipe = TrainConfig(init_view=str(tmp_path / "plain"), train="repair", block_size=6)
    first = starting_view(load(), recipe)
    assert first.config.repair_rank == 128
    assert first.config.provenance == {"twins": {"recipe": {"seed": 5}}}
    assert starting_view(load(), replace(recipe, train="view")).repair is None
    assert starting_view(load(), TrainConfig(repair_rank=3)).config.repair_rank == 3
    first = starting_view(load(), replace(recipe, repair_rank=4))
    torch.nn.init.normal_(first.repair.out.weight)
    save_view(first, tmp_path / "headed")
    again = replace(recipe, init_view=str(tmp_path / "headed"))
    for rank in (None, 4):
        dual = starting_view(load(), replace(again, repair_rank=rank))
        assert torch.equal(dual.repair.out.weight, first.repair.out.weight)
    with pytest.raises(UserInputError, match="repair head of rank 4, the recipe wants"):
        starting_view(load(), replace(again, repair_rank=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "repair"}, "needs init_view"),
        ({"train": "twins"}, "train must be one of"),
        ({"repair_rank": 0}, "repair_rank must be a positive number"),
        ({"repair_rank": "four"}, "repair_rank must be a positive number"),
    ],
)
def test_wrong_recipes_are_refused_in_one_sentence(change, message):
    with pytest.raises(UserInputError, match=message):
        TrainConfig(**change)
