"""Dialogues of several turns: what is asked next, what ends one, and what of it is trained on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.folders import letter_tokenizer
from tests.packed import pack

from orthrus.base.prompt import encode_prompt
from orthrus.errors import UserInputError
from orthrus.training.blocks import BlockLayout, draw_blocks
from orthrus.training.corpus import Sample
from orthrus.training.dialogues import Dialogue, answered, begin, turn_template, user_said

# U and A open a turn, </s> ends it.
TEMPLATE = (
    "{% for m in messages %}{{ 'U ' if m.role == 'user' else 'A ' }}{{ m.content }}</s> {% endfor %}"
    "{% if add_generation_prompt %}A {% endif %}"
)
END = 2


def base_of(template: str | None = TEMPLATE) -> Any:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = template
    return SimpleNamespace(
        name="tiny",
        tokenizer=tokenizer,
        eos_token_ids=frozenset({END}),
        encode_prompt=lambda prompt: encode_prompt(tokenizer, prompt),
    )


BASE = base_of()
PIECES = turn_template(BASE)


def ids(text: str) -> list[int]:
    return list(BASE.tokenizer(text, add_special_tokens=False)["input_ids"])


def text_of(token_ids: list[int]) -> str:
    return str(BASE.tokenizer.decode(token_ids))


def say(dialogue: Dialogue, text: str, *, finished: bool = True, most_tokens: int = 1000) -> Dialogue:
    # A turn of the user's begins with the space that the template has before it.
    spoken = f" {text}" if dialogue.side == "user" else text
    token_ids = [*ids(spoken), *([END] if finished else [])]
    heard = answered if dialogue.side == "answer" else user_said
    return heard(dialogue, token_ids, BASE, PIECES, finished=finished, most_tokens=most_tokens)


def test_given_turns_are_asked_one_after_the_other_and_read_as_the_template_writes_them() -> None:
    dialogue = begin(BASE.encode_prompt("Hi there"), ["And then?"], "chat")
    assert text_of(dialogue.prompt_ids) == "U Hi there</s> A "
    dialogue = say(dialogue, "Hello")
    messages = [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "And then?"},
    ]
    assert dialogue.side == "answer"
    assert dialogue.prompt_ids == BASE.encode_prompt(messages)
    dialogue = say(dialogue, "Bye")
    assert dialogue.side is None
    sample = dialogue.sample()
    assert sample is not None
    answers = [text_of(list(sample.answer_ids[start:end])) for start, end in sample.answer_spans]
    assert answers == ["Hello</s>", "Bye</s>"]


def test_the_model_writes_the_turns_that_are_missing() -> None:
    dialogue = say(begin(BASE.encode_prompt("Hi there"), [], "chat", num_turns=2), "Hello")
    assert dialogue.side == "user"
    assert text_of(dialogue.prompt_ids) == "U Hi there</s> A Hello</s> U"
    dialogue = say(dialogue, "What is new")
    assert dialogue.side == "answer"
    assert text_of(dialogue.prompt_ids) == "U Hi there</s> A Hello</s> U What is new</s> A "
    dialogue = say(dialogue, "Nothing")
    assert dialogue.side is None
    assert len(dialogue.spans) == 2


def test_no_more_turns_are_asked_than_are_wanted() -> None:
    dialogue = say(begin(BASE.encode_prompt("One"), ["Two", "Three"], "chat", num_turns=1), "Hello")
    assert dialogue.side is None
    sample = dialogue.sample()
    assert sample == Sample(tuple(dialogue.first_ids), (*ids("Hello"), END), "chat")


@pytest.mark.parametrize(
    ("said", "finished", "most_tokens"),
    [("Hello", False, 1000), ("Hello", True, 20), ("abc" * 12, True, 1000)],
    ids=["cut off", "too long", "in circles"],
)
def test_an_answer_after_which_nobody_would_go_on_ends_the_dialogue(
    said: str, finished: bool, most_tokens: int
) -> None:
    dialogue = begin(BASE.encode_prompt("Hi there"), ["And then?"], "chat", num_turns=5)
    dialogue = say(dialogue, said, finished=finished, most_tokens=most_tokens)
    assert dialogue.side is None
    assert (dialogue.sample() is None) == (said != "Hello")


@pytest.mark.parametrize(
    ("said", "finished"), [("Go on", False), ("x", True), ("", True), ("Hi Hi " * 8, True)]
)
def test_a_poor_turn_of_the_user_ends_the_dialogue_before_it(said: str, finished: bool) -> None:
    dialogue = say(begin(BASE.encode_prompt("Hi there"), [], "chat", num_turns=3), "Hello")
    dialogue = say(dialogue, said, finished=finished)
    assert dialogue.side is None
    sample = dialogue.sample()
    assert sample is not None
    assert text_of(list(sample.answer_ids)) == "Hello</s>"


def test_blocks_train_answers_alone() -> None:
    dialogue = begin(BASE.encode_prompt("Hi there"), [], "chat", num_turns=2)
    for text in ("Hello you", "What is new", "Nothing new"):
        dialogue = say(dialogue, text)
    sample = dialogue.sample()
    assert sample is not None
    sequences = pack([sample, Sample((5, 6), (7, 8, 9), "chat")], 96)
    written = {len(sample.prompt_ids) + i for span in sample.spans for i in range(*span)}
    batch = draw_blocks(sequences, [0], 30, BlockLayout(block_size=4))
    second = len(sample.prompt_ids) + len(sample.answer_ids) + 2
    # A target row at t predicts t + 1.
    predicted = set((batch.target_BNJ[batch.valid_BNJ] + 1).tolist())
    starts = {len(sample.prompt_ids) + start for start, _ in sample.spans} | {second}
    assert predicted == (written | {second + 1, second + 2}) - starts
    assert torch.equal(sequences[0].answer_T.unique(), torch.tensor([-1, 0, 1, 2]))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template.*; give --turns 1"),
        ("{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}", "one turn only"),
        ("U {{ messages[0].content }}", "does not keep what was said"),
    ],
)
def test_a_base_that_cannot_hold_a_dialogue_is_refused_in_one_sentence(
    template: str | None, message: str
) -> None:
    with pytest.raises(UserInputError, match=message) as caught:
        turn_template(base_of(template))
    assert "\n" not in str(caught.value)
