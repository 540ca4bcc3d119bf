"""Overfitting, exact resume, and what the trainer refuses."""

import math
import time
from dataclasses import replace

import pytest
import torch
from tests.engines import decode
from tests.packed import corpus_digest, pack
from tests.run_states import state, state_bytes
from tests.tiny import tiny_dual, tiny_prompt

from orthrus.config import DecodeConfig
from orthrus.errors import StorageError, UserInputError
from orthrus.training.corpus import Sample
from orthrus.training.recipe import TrainConfig
from orthrus.training.recipe_file import load_recipe
from orthrus.training.state_folder import shards_folder
from orthrus.training.trainer import DivergedError, Hooks, learning_rate, train

CONFIG = TrainConfig(
    block_size=5,
    num_anchors=8,
    sequence_length=48,
    batch_size=2,
    steps=12,
    learning_rate=1e-2,
    dtype="float32",
    save_every=4,
    log_every=3,
)


def own_answers(dual, num_prompts, length):
    """The base's own greedy answers: what a corpus holds."""
    samples = []
    for seed in range(num_prompts):
        prompt = tiny_prompt(6, seed)
        config = DecodeConfig(max_new_tokens=length, strategy="ar")
        result = decode(dual, prompt, config)
        samples.append(Sample(tuple(prompt), result.token_ids, "test"))
    return samples


def run(tmp_path, name, config=CONFIG, hooks=None, dual=None, samples=None, held=None):
    dual = dual or tiny_dual(block_size=5, mask_token_id=None)
    samples = samples or own_answers(dual, 5, 20)
    sequences = pack(samples, config.sequence_length)
    config = replace(config, output=str(tmp_path / name))
    state = train(dual, sequences, config, corpus_digest(samples), hooks or Hooks(), held)
    return dual, state


def test_a_view_overfits_a_tiny_corpus_to_full_acceptance(tmp_path):
    dual = tiny_dual(block_size=5, mask_token_id=None)
    config = replace(CONFIG, steps=250, num_anchors=19, batch_size=5, sequence_length=26, weights="uniform")
    run(tmp_path, "overfit", config, dual=dual)
    accepted = drafted = 0
    for sample in own_answers(dual, 5, 20):
        settings = DecodeConfig(max_new_tokens=20, strategy="chain", floor=False)
        result = decode(dual, list(sample.prompt_ids), settings)
        assert result.token_ids == sample.answer_ids
        accepted, drafted = accepted + result.stats.num_accepted, drafted + result.stats.num_drafted
    assert accepted == drafted > 0


def test_the_learning_rate_rises_to_its_peak_and_ends_at_a_share_of_it():
    config = replace(CONFIG, learning_rate=2.0, warmup=0.1, min_lr_ratio=0.25)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.5)


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    whole, _ = run(tmp_path, "whole")
    calls = iter([False] * 4 + [True] * 20)
    _, state = run(tmp_path, "parts", hooks=Hooks(should_stop=lambda: next(calls)))
    assert state.step == 5
    resumed, state = run(tmp_path, "parts")
    assert state.step == 12
    for name, parameter in resumed.view_parameters().items():
        assert torch.equal(parameter, whole.view_parameters()[name]), name


def test_a_run_ends_with_the_moving_mean_of_its_weights_however_often_it_stopped(tmp_path):
    config = replace(CONFIG, ema_decay=0.8)
    whole, _ = run(tmp_path, "whole", config)
    means = dict(tiny_dual(block_size=5, mask_token_id=None).view_parameters())
    for step in range(1, 13):
        # Stops after each step, so that the state holds the weights of it.
        resumed, _ = run(tmp_path, "parts", config, Hooks(should_stop=lambda: True))
        share = 1 - min(0.8, step / (step + 9))
        weights = state(tmp_path / "parts")["view"]
        means = {name: mean + share * (weights[name] - mean) for name, mean in means.items()}
    plain, _ = run(tmp_path, "plain")
    for name, parameter in whole.view_parameters().items():
        assert torch.equal(parameter, resumed.view_parameters()[name]), name
        torch.testing.assert_close(parameter.detach(), means[name].detach(), atol=1e-6, rtol=1e-5)
        assert not torch.equal(parameter, plain.view_parameters()[name]), name
        # The weights went the way of a run without a mean.
        assert torch.equal(weights[name], plain.view_parameters()[name]), name


def test_real_decodes_score_the_mean(tmp_path):
    scored = []
    hooks = Hooks(evaluate=lambda dual, step: scored.append(copied(dual)) or 1.0)
    dual, _ = run(tmp_path, "mean", replace(CONFIG, ema_decay=0.8, evaluate_every=8), hooks)
    assert len(scored) == 2
    assert all(torch.equal(scored[1][name], p) for name, p in copied(dual).items())
    assert not any(torch.equal(scored[0][name], p) for name, p in copied(dual).items())


def copied(dual):
    return {name: p.detach().clone() for name, p in dual.view_parameters().items()}


def test_resuming_with_another_recipe_is_refused_and_loses_nothing(tmp_path):
    run(tmp_path, "run", replace(CONFIG, steps=2))
    before = state_bytes(tmp_path / "run")
    with pytest.raises(UserInputError, match="learning_rate"):
        run(tmp_path, "run", replace(CONFIG, steps=2, learning_rate=5e-3))
    assert state_bytes(tmp_path / "run") == before


def test_logs_report_the_block_positions(tmp_path):
    logs = []
    run(tmp_path, "logs", hooks=Hooks(on_log=logs.append))
    assert [log.step for log in logs] == [3, 6, 9, 12]
    assert all(len(log.accuracy_J) == 4 and 1.0 <= log.expected_tokens <= 5.0 for log in logs)
    assert logs[-1].loss < logs[0].loss
    assert logs[-1].seconds_left == 0


def test_a_diverged_loss_keeps_the_saved_state(tmp_path):
    run(
        tmp_path,
        "run",
        replace(CONFIG, steps=20),
        hooks=Hooks(should_stop=iter([False] * 3 + [True]).__next__),
    )
    before = state_bytes(tmp_path / "run")
    dual = tiny_dual(block_size=5, mask_token_id=None)
    with torch.no_grad():
        dual.base.get_output_embeddings().weight.fill_(math.nan)
    samples = own_answers(tiny_dual(block_size=5, mask_token_id=None), 5, 20)
    config = replace(CONFIG, steps=20, output=str(tmp_path / "run"))
    with pytest.raises(DivergedError, match="learning_rate"):
        train(dual, pack(samples, 48), config, corpus_digest(samples), Hooks())
    assert state_bytes(tmp_path / "run") == before


def test_a_save_that_fails_ends_the_run_soon_and_keeps_the_state_before(tmp_path):
    logs = []

    def fill_the_disk(log):
        logs.append(log.step)
        shards = shards_folder(tmp_path / "run", 20)
        if log.step == 19:
            shards.mkdir()
            (shards / "shard-00001-model-00001-of-00001.safetensors").symlink_to("/dev/full")
        elif log.step > 20:
            time.sleep(0.3)

    config = replace(CONFIG, steps=60, save_every=10, log_every=1)
    with pytest.raises(StorageError, match="the disk ran full"):
        run(tmp_path, "run", config, hooks=Hooks(on_log=fill_the_disk))
    assert 20 <= logs[-1] < 30
    assert state(tmp_path / "run")["step"] == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1e-3", "did you mean learning_rate"),
        ("row_length: 512", r"did you mean sequence_length\?"),
        ("batch_rows: 4", r"did you mean batch_size\?"),
        ("micro_rows: 1", r"did you mean micro_batch_size\?"),
        ("rows: 4", "the keys are base, corpus"),
        ("loss: kld", "loss must be one of"),
        ("block_size: many", "block_size must be a whole number"),
        ("ema_decay: 1", "ema_decay must lie between 0 and below 1"),
        ("- a list", "must hold"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_recipes_are_refused_in_one_sentence(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserInputError, match=message):
        load_recipe(file)


def test_overrides_win_and_numbers_may_be_written_as_text(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("learning_rate: 2e-4\nlayers: [0, 1]\n")
    config = load_recipe(file, ["block_size=16", "learning_rate=1e-3"])
    assert (config.block_size, config.learning_rate, config.layers) == (16, 1e-3, (0, 1))
