"""Corpora: resuming, what is kept out, and that batches answer like single rows."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.engines import decode, engine_for
from tests.packed import corpus_digest
from tests.tiny import tiny_dual, tiny_prompt
from tests.tiny_orthrus import tiny_orthrus
from torch import Tensor

from orthrus.base.loading import Base
from orthrus.config import DecodeConfig, SamplingParams
from orthrus.errors import CorruptFileError, UnsupportedModelError, UserInputError
from orthrus.model.runner import EagerRunner
from orthrus.training.answers import Answer, EngineAnswerer, Question, answer_all
from orthrus.training.corpus import (
    PROMPTS,
    Unseen,
    read_corpus,
    read_jsonl,
    read_prompts,
    shard_path,
)
from orthrus.training.manifest import MANIFEST
from orthrus.training.prompt_sources import PromptSource
from orthrus.training.self_prompts import OPENINGS, is_repetitive, self_prompts
from orthrus.training.synth import SynthConfig, SynthProgress, synthesise

ORTHRUS = tiny_orthrus()
ENGINE = EngineAnswerer(ORTHRUS.engine, 3, ORTHRUS.base.eos_token_ids)


def config(folder: Path, **changes: object) -> SynthConfig:
    """Ten prompts in shards of four."""
    file = folder / "prompts.jsonl"
    if not file.is_file():
        file.write_text("".join(json.dumps({"prompt": f"Number {i}, please"}) + "\n" for i in range(10)))
    settings = {"sources": (PromptSource(file=str(file), domain="chat"),), "batch_size": 3, "shard_size": 4}
    return SynthConfig(**(settings | {"max_new_tokens": 12, "seed": 5} | changes))  # type: ignore[arg-type]


def make(
    tmp_path: Path, name: str = "corpus", config_: SynthConfig | None = None, base: Base = ORTHRUS.base
) -> Path:
    synthesise(base, ENGINE, config_ or config(tmp_path), tmp_path / name)
    return tmp_path / name


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.name != MANIFEST}


def test_a_corpus_that_lost_its_last_shard_is_completed_as_before(tmp_path: Path) -> None:
    folder = make(tmp_path)
    whole = contents(folder)
    assert len(whole) == 5
    shard_path(folder, 2).unlink()
    shard_path(folder, 0).unlink()
    make(tmp_path)
    assert contents(folder) == whole


def test_an_interrupted_corpus_goes_on_and_equals_an_unbroken_one(tmp_path: Path) -> None:
    whole = contents(make(tmp_path, "whole"))

    def interrupt(progress: SynthProgress) -> None:
        if progress.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise(ORTHRUS.base, ENGINE, config(tmp_path), tmp_path / "parts", interrupt)
    assert sorted(file.name for file in (tmp_path / "parts").glob("answers-*")) == ["answers-00000.jsonl"]
    assert contents(make(tmp_path, "parts")) == whole


def test_progress_counts_answers_and_estimates_from_whole_shards(tmp_path: Path) -> None:
    seen: list[SynthProgress] = []
    synthesise(ORTHRUS.base, ENGINE, config(tmp_path), tmp_path / "corpus", seen.append)
    answers = [p for p in seen if p.stage == "answers"]
    assert {p.done for p in answers} == set(range(11))
    assert all(p.seconds_left is None for p in answers if p.done < 4)
    assert all(p.seconds_left is not None for p in answers if p.done > 4)
    assert answers[-1].seconds_left == 0
    assert answers[-1].num_tokens >= sum(len(s.answer_ids) for s in read_corpus(tmp_path / "corpus"))


def test_answers_are_the_bases_own_and_shares_are_kept(tmp_path: Path) -> None:
    samples = list(read_corpus(make(tmp_path, config_=config(tmp_path, greedy_share=1.0))))
    for sample in samples:
        settings = DecodeConfig(max_new_tokens=12, strategy="ar")
        alone = decode(ORTHRUS.dual, list(sample.prompt_ids), settings, eos=frozenset({2}))
        assert alone.token_ids == sample.answer_ids
    sampled = list(read_corpus(make(tmp_path, "sampled", config(tmp_path, greedy_share=0.0))))
    assert corpus_digest(sampled) != corpus_digest(samples)
    manifest = json.loads((tmp_path / "sampled" / MANIFEST).read_text())
    assert manifest["settings"]["greedy_share"] == 0.0
    assert manifest["provenance"]["versions"]["torch"]


@pytest.mark.parametrize("name", ["llama", "qwen3-sliding", "gemma3"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_answer_is_a_function_of_its_question(name: str, batch_size: int) -> None:
    """Greedy and sampled, whatever is answered beside it."""
    dual, eos = tiny_dual(name), frozenset({7, 20})
    lengths = (3, 14, 7, 1, 9, 5)
    sampled = SamplingParams(temperature=1.0, seed=4)
    questions = [
        Question(i, tiny_prompt(length, i), sampled if i in (2, 5) else SamplingParams())
        for i, length in enumerate(lengths)
    ]
    answers = answer_all(
        engine_for(dual), iter(questions), batch_size=batch_size, max_new_tokens=15, eos_token_ids=eos
    )
    found = {answer.key: answer for answer in answers}
    assert found.keys() == set(range(6))
    for key, prompt_ids, sampling, _ in questions:
        settings = DecodeConfig(max_new_tokens=15, strategy="ar", sampling=sampling)
        alone = decode(dual, prompt_ids, settings, eos=eos)
        assert tuple(found[key].token_ids) == alone.token_ids
        assert found[key].finished == (alone.finish_reason == "stop")


class Overflowing(EagerRunner):
    """A model whose logits are NaN, like one with a dtype that is too small for it."""

    def head(self, hidden_RC: Tensor, *, drafts: bool = False) -> Tensor:
        return super().head(hidden_RC, drafts=drafts) * float("nan")


def test_a_request_that_fails_is_no_answer(tmp_path: Path) -> None:
    engine = engine_for(Overflowing(tiny_dual()))
    question = Question(0, tiny_prompt(5), SamplingParams())
    with pytest.raises(UnsupportedModelError, match="load it in another dtype"):
        list(
            answer_all(
                engine, [question], batch_size=1, max_new_tokens=4, eos_token_ids=ORTHRUS.base.eos_token_ids
            )
        )
    failing = EngineAnswerer(engine, 3, ORTHRUS.base.eos_token_ids)
    with pytest.raises(UnsupportedModelError, match="load it in another dtype"):
        synthesise(ORTHRUS.base, failing, config(tmp_path), tmp_path / "corpus")
    assert not list((tmp_path / "corpus").glob("answers-*"))


def test_other_held_out_texts_are_another_corpus(tmp_path: Path) -> None:
    """Its prompts were chosen without the new ones in mind."""
    kept_out = tmp_path / "heldout.jsonl"
    kept_out.write_text('{"turns": ["Nothing of it", "Number 3, please"]}\n')
    held = config(tmp_path, held_out=(str(kept_out),))
    folder = make(tmp_path, config_=held)
    # The second turn counts as well.
    assert len(list(read_prompts(folder))) == 9
    make(tmp_path, config_=held)
    kept_out.write_text(kept_out.read_text() + '{"prompt": "Number 4, please"}\n')
    with pytest.raises(UserInputError, match=r"other settings \(held_out_texts\)"):
        make(tmp_path, config_=held)


def test_answers_are_never_given_to_other_prompts(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / PROMPTS).write_text("no prompts\n")
    with pytest.raises(CorruptFileError, match=r"prompts\.jsonl, line 1 .* restore the file"):
        make(tmp_path)
    (folder / PROMPTS).unlink()
    with pytest.raises(CorruptFileError, match="answers without their prompts"):
        make(tmp_path)


def test_held_out_prompts_and_duplicates_stay_out(tmp_path: Path) -> None:
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text(json.dumps({"prompt": "number 3 PLEASE!"}) + "\n")
    settings = config(tmp_path, held_out=(str(held_out),))
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Number 4, please"}) + "\n")
    synthesise(ORTHRUS.base, ENGINE, settings, tmp_path / "corpus", keep_out=["Number 5, please"])
    kept = [r["prompt_ids"] for r in read_jsonl(tmp_path / "corpus" / PROMPTS)]
    expected = [i for i in range(10) if i not in (3, 5)]
    assert sorted(kept) == sorted(ORTHRUS.base.encode_prompt(f"Number {i}, please") for i in expected)


def test_texts_count_as_the_same_by_words_and_by_containment() -> None:
    unseen = Unseen(["What is two plus two?"])
    assert not unseen("WHAT is two, plus two")
    assert not unseen("Please tell me: what is two plus two? Thank you.")
    assert not unseen("...")
    assert unseen("What is two plus three?")
    assert not unseen("what is two plus three")


def test_repetition_filter() -> None:
    assert is_repetitive([1, 2, 3] * 10)
    assert not is_repetitive(list(range(30)))
    # Too short to tell.
    assert not is_repetitive([1, 1, 1, 1, 1, 1])


class Told:
    """Answers as it was told to, one after the other; keeps what it was asked."""

    origin = None

    def __init__(self, answers: Callable[[Question], Answer]) -> None:
        self.answers, self.asked = answers, list[Question]()

    def check(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[dict[str, Any]]:
        return []

    def __call__(self, questions: Iterable[Question], *, max_new_tokens: int) -> Iterator[Answer]:
        for question in questions:
            self.asked.append(question)
            yield self.answers(question)


def test_answers_that_go_round_in_circles_are_left_out(tmp_path: Path) -> None:
    told = Told(lambda q: Answer(q.key, [5] * 12 if q.key % 2 else list(range(12)), True))
    folder = tmp_path / "corpus"
    synthesise(ORTHRUS.base, told, config(tmp_path), folder)
    assert len(list(read_corpus(folder))) == 5
    assert all(record["prompt"] % 2 == 0 for file in folder.glob("answers-*") for record in read_jsonl(file))


def test_prompts_of_its_own_making() -> None:
    base = ORTHRUS.base

    class Templated(type(base.tokenizer)):  # type: ignore[misc]
        chat_template = "user: {{ messages[0].content }}\nassistant:"

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return dict(super().__call__(text))

        special_tokens_map: ClassVar[dict[str, str]] = {}

        def get_chat_template(self) -> str:
            return self.chat_template

        def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
            return " ".join(f"w{i}" for i in token_ids)

    written = [list(range(9)), [1, 2], [4] * 20, list(range(30, 45))]
    told = Told(lambda q: Answer(q.key, written[q.key], q.key != 3))
    templated = dataclasses.replace(base, tokenizer=Templated())  # type: ignore[arg-type]
    found = list(self_prompts(templated, told, {"mine": 4}, seed=0))
    # The second is too short, the third goes round in circles, the fourth was cut off.
    assert found == [(" ".join(f"w{i}" for i in range(9)), "mine")]
    assert told.asked[0].prompt_ids == base.tokenizer("user:")["input_ids"]
    with pytest.raises(UserInputError, match="no chat template"):
        list(self_prompts(base, told, {"math": 1}, seed=0))
    for template, problem in (
        ("{{ raise_exception('no lone user') }}", "refuses these messages .no lone user"),
        ("user:", "does not keep what was said"),
        ("{% for i in range(99999999) %}\n{% endfor %}", "takes longer than|builds more than|fails on"),
    ):
        templated.tokenizer.chat_template = template
        with pytest.raises(UserInputError, match=problem):
            list(self_prompts(templated, told, {"mine": 1}, seed=0))


def test_a_prompt_of_its_own_begins_with_the_opening_and_no_opening_ends_with_a_space() -> None:
    openings = [opening for several in OPENINGS.values() for opening in several]
    assert not [opening for opening in openings if opening.endswith(" ")]
    assert min(map(len, OPENINGS.values())) >= 3

    class Decoding(type(ORTHRUS.base.tokenizer)):  # type: ignore[misc]
        chat_template = "{{ messages[0].content }}"
        special_tokens_map: ClassVar[dict[str, str]] = {}

        def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

        def get_chat_template(self) -> str:
            return self.chat_template

        def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
            # As a SentencePiece tokenizer: the first space is gone.
            return "".join(map(chr, token_ids)).removeprefix(" ")

    told = Told(lambda q: Answer(q.key, [ord(c) for c in " the first of all people"], True))
    base = dataclasses.replace(ORTHRUS.base, tokenizer=Decoding())
    found = list(self_prompts(base, told, {"questions": 1}, seed=0))
    assert found == [(f"{OPENINGS['questions'][0]} the first of all people", "questions")]


def test_a_manifest_of_other_settings_or_another_base_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path)
    before = contents(folder)
    with pytest.raises(UserInputError, match=r"other settings \(seed, temperature"):
        make(tmp_path, config_=config(tmp_path, seed=6, temperature=0.7))
    other = dataclasses.replace(
        ORTHRUS.base, source=dataclasses.replace(ORTHRUS.base.source, origin="elsewhere")
    )
    with pytest.raises(UserInputError, match=r"other settings \(base"):
        make(tmp_path, base=other)
    assert contents(folder) == before
    (folder / MANIFEST).write_text("{")
    with pytest.raises(CorruptFileError, match="damaged"):
        make(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path)
    shard_path(folder, 1).write_text('{"prompt": 1, "answer')
    with pytest.raises(CorruptFileError, match=r"answers-00001\.jsonl, line 1"):
        list(read_corpus(folder))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"greedy_share": -0.1}, "greedy_share"),
        ({"temperature": 0.0}, "temperature"),
        ({"batch_size": 0}, "batch_size"),
        ({"sources": ()}, "source"),
    ],
)
def test_wrong_settings(tmp_path: Path, changes: dict[str, object], word: str) -> None:
    with pytest.raises(UserInputError, match=word):
        config(tmp_path, **changes)
