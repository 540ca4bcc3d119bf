"""Many dialogues at once: each is what it would be alone, and a corpus of them comes back as it was held."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.tiny_orthrus import tiny_orthrus
from tests.training.test_dialogues import BASE, END, ids, text_of

from orthrus.config import SamplingParams
from orthrus.errors import UserInputError
from orthrus.training.answers import Answer, EngineAnswerer, Question
from orthrus.training.corpus import read_corpus, read_prompts
from orthrus.training.dialogue_rounds import Outcome, Rounds
from orthrus.training.dialogues import Dialogue, begin
from orthrus.training.endpoint_reply import FORMS, request_body
from orthrus.training.prompt_sources import PromptSource
from orthrus.training.synth import SynthConfig, synthesise


class Scripted:
    """Says what a list says, number by number of the dialogue's turn; keeps what it was asked."""

    origin = None

    def __init__(self, *said: str, left_out: dict[int, str] | None = None) -> None:
        self.said, self.left_out = said, left_out or {}
        self.asked: list[Question] = []

    def __call__(self, questions: Iterable[Question], *, max_new_tokens: int) -> Iterator[Answer]:
        for question in reversed(list(questions)):
            number = sum(asked.key == question.key for asked in self.asked)
            self.asked.append(question)
            if number == len(self.said) - 1 and question.key in self.left_out:
                yield Answer(question.key, [], False, self.left_out[question.key])
            else:
                yield Answer(question.key, [*self._words(question, number), END], True)

    def _words(self, question: Question, number: int) -> list[int]:
        """A user turn begins with the space that the template has before it."""
        space = " " if question.prompt_ids[-1] == ids("U")[0] else ""
        return ids(space + self.said[number])


def hold(
    answerer: Scripted, dialogues: dict[int, Dialogue], temperature: float = 0.0, most_tokens: int = 1000
) -> tuple[dict[int, Outcome], list[tuple[int, bool]]]:
    told: list[tuple[int, bool]] = []
    rounds = Rounds(BASE, answerer, 50, most_tokens, lambda text: "Forbidden" in text)  # type: ignore[arg-type]
    sampling = {
        key: SamplingParams(temperature=temperature, seed=key if temperature else None) for key in dialogues
    }
    texts = dict.fromkeys(dialogues, "Hi there")
    outcomes = rounds.hold(dialogues, sampling, texts, lambda number, over: told.append((number, over)))
    return {outcome.key: outcome for outcome in outcomes}, told


def three() -> dict[int, Dialogue]:
    """One answer; a turn that was given; a turn that the model writes."""
    first = BASE.encode_prompt("Hi there")
    return {
        3: begin(first, [], "chat"),
        4: begin(first, ["And then"], "chat"),
        5: begin(first, [], "chat", num_turns=2),
    }


def test_each_dialogue_goes_on_as_long_as_it_was_asked_to() -> None:
    answerer = Scripted("Hello you", "What is new", "Nothing new")
    outcomes, told = hold(answerer, three())
    texts = {key: text_of(list(outcome.dialogue.ids)) for key, outcome in outcomes.items()}
    assert texts == {
        3: "Hello you</s>",
        4: "Hello you</s> U And then</s> A What is new</s>",
        5: "Hello you</s> U What is new</s> A Nothing new</s>",
    }
    assert sum(over for _, over in told) == 3
    assert sum(number for number, _ in told) == sum(
        end - start for o in outcomes.values() for start, end in o.dialogue.spans
    )
    record = outcomes[5].record()
    assert record is not None
    assert len(record["spans"]) == 2
    assert outcomes[3].record() == {"prompt": 3, "answer_ids": [*ids("Hello you"), END], "finished": True}
    # What servers of chat messages are sent, who cannot write a turn of the user.
    asked = {q.texts for q in answerer.asked if q.key == 4}
    assert asked == {("Hi there",), ("Hi there", "Hello you", "And then")}
    assert [q.texts for q in answerer.asked if q.key == 5] == [("Hi there",), None, None]


def test_no_two_draws_of_a_dialogue_share_their_noise_and_the_user_is_always_drawn() -> None:
    answerer = Scripted("Hello you", "What is new", "Nothing new")
    hold(answerer, {5: three()[5]}, temperature=0.8)
    first, user, second = (question.sampling for question in answerer.asked)
    assert first == SamplingParams(temperature=0.8, seed=5)
    assert len({first.seed, user.seed, second.seed}) == 3
    assert (user.temperature, second.temperature) == (1.0, 0.8)
    answerer = Scripted("Hello you", "What is new", "Nothing new")
    hold(answerer, {5: three()[5]})
    first, user, second = (question.sampling for question in answerer.asked)
    assert (first.temperature, user.temperature, second.temperature) == (0.0, 1.0, 0.0)


def test_a_server_that_leaves_an_answer_out_costs_the_turn_and_not_the_dialogue() -> None:
    outcomes, _ = hold(Scripted("Hello you", "What", left_out={4: "refused"}), {4: three()[4]})
    record = outcomes[4].record()
    assert record is not None
    assert (text_of(record["answer_ids"]), record["finished"]) == ("Hello you</s>", True)
    outcomes, _ = hold(Scripted("Hello you", left_out={3: "refused"}), {3: three()[3]})
    assert outcomes[3].record() == {
        "prompt": 3,
        "answer_ids": [],
        "finished": False,
        "left_out": "refused",
    }


def test_a_held_out_turn_of_the_model_ends_the_dialogue_and_an_answer_in_circles_leaves_nothing() -> None:
    outcomes, told = hold(Scripted("Hello you", "Forbidden words"), {5: three()[5]})
    assert text_of(list(outcomes[5].dialogue.sample().answer_ids)) == "Hello you</s>"  # type: ignore[union-attr]
    assert told[-1] == (0, True)
    outcomes, _ = hold(Scripted("Hi Hi " * 8), {3: three()[3]})
    assert outcomes[3].record() is None


def test_a_server_of_chat_messages_gets_the_dialogue_and_writes_no_turn_of_the_user() -> None:
    question = Question(0, [1], SamplingParams(), ("Hi", "Hello", "And then"))
    messages = request_body(question, FORMS[-1], "model", 8)["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert [m["content"] for m in messages] == ["Hi", "Hello", "And then"]
    with pytest.raises(UserInputError, match="leave --turns out"):
        request_body(question._replace(texts=None), FORMS[-1], "model", 8)


def corpus(folder: Path, name: str, turns: int | None, batch_size: int) -> Path:
    file = folder / "prompts.jsonl"
    lines = [{"turns": [f"Number {i}", "And then what", "Held out text"]} for i in range(6)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "held-out.jsonl").write_text(json.dumps({"prompt": "held out TEXT"}) + "\n")
    # A tiny random model never ends an answer: each third token does so for it.
    orthrus = tiny_orthrus()
    base = replace(
        orthrus.base,
        tokenizer=BASE.tokenizer,
        eos_token_ids=frozenset(range(2, 26)),
    )
    config = SynthConfig(
        sources=(PromptSource(file=str(file)),),
        held_out=(str(folder / "held-out.jsonl"),),
        turns=turns,
        max_new_tokens=12,
        max_prompt_tokens=200,
        shard_size=4,
        batch_size=batch_size,
    )
    answerer = EngineAnswerer(orthrus.engine, batch_size, base.eos_token_ids)
    synthesise(base, answerer, config, folder / name)
    return folder / name


def test_given_turns_are_used_to_the_end_and_a_batch_changes_no_answer(tmp_path: Path) -> None:
    folder = corpus(tmp_path, "given", None, 4)
    assert {tuple(prompt["turns"]) for prompt in read_prompts(folder)} == {("And then what",)}
    samples = list(read_corpus(folder))
    assert samples
    assert max(len(sample.answer_spans) for sample in samples) == 2
    assert samples == list(read_corpus(corpus(tmp_path, "alone", None, 1)))
    first = list(read_corpus(corpus(tmp_path, "first", 1, 4)))
    assert all(len(sample.answer_spans) == 1 for sample in first)


def test_a_number_of_turns_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="turns must be at least 1, not 0"):
        corpus(tmp_path, "none", 0, 1)
