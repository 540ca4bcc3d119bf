"""Inputs that once broke the corpus or the trainer."""

from dataclasses import replace

import pytest

from orthrus.errors import UserInputError
from orthrus.training.corpus import Unseen, normalised
from orthrus.training.prompt_sources import read_prompts_of
from orthrus.training.recipe import TrainConfig
from orthrus.training.recipe_file import load_recipe
from orthrus.training.trainer import sequences_of_step


def test_every_script_counts_as_words():
    unseen = Unseen(held_out=["天空是蓝色的"])
    assert normalised("Сколько будет 2 + 3?") != normalised("Чему равно 2 + 3?")
    assert unseen("Сколько будет 2 + 3?")
    assert unseen("Чему равно 2 + 3?")
    assert not unseen("сколько будет 2 + 3")
    assert not unseen("为什么天空是蓝色的")


def test_a_prompt_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserInputError, match="UTF-8"):
        read_prompts_of(file)
    file.write_text('{"messages": [{"role": "system", "content": "abc"}]}')
    with pytest.raises(UserInputError, match="line 1: no user turn"):
        read_prompts_of(file)


def test_any_seed_that_fits_gives_sequences():
    for seed in (0, 20260101, 2**62):
        picked = sequences_of_step(7, 3, 5, seed)
        assert len(picked) == 3
        assert all(0 <= index < 7 and 0 <= anchor_seed < 2**63 for index, anchor_seed in picked)
    assert sequences_of_step(7, 3, 5, 1) != sequences_of_step(7, 3, 5, 2)


@pytest.mark.parametrize("text", ["steps:", "block_size: [8]"])
def test_recipe_values_of_the_wrong_kind_are_refused(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserInputError, match=text.split(":")[0]):
        load_recipe(file)
    with pytest.raises(UserInputError, match="cannot be read"):
        load_recipe(tmp_path)


def test_fewer_sequences_than_processes_are_refused(monkeypatch, tmp_path):
    from tests.packed import pack
    from tests.tiny import tiny_dual
    from tests.training.test_trainer import CONFIG, own_answers

    from orthrus.training import trainer

    dual = tiny_dual(block_size=5, mask_token_id=None)
    sequences = pack(own_answers(dual, 2, 10), 48)
    many = type("Processes", (), {"count": 4})()
    monkeypatch.setattr(trainer, "Processes", lambda _: many)
    config: TrainConfig = replace(CONFIG, output=str(tmp_path / "run"))
    with pytest.raises(UserInputError, match="batch_size 2 is less than a sequence for each of 4"):
        trainer.train(dual, sequences, config, "digest", trainer.Hooks())
