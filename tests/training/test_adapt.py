"""Re-tuning: which requests of a log count, what a new view is judged by, and that no view is ever lost."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.folders import letter_tokenizer
from tests.tiny import tiny_dual, tiny_prompt
from tests.tiny_orthrus import tiny_orthrus

from orthrus.base.bench_prompts import load_prompts
from orthrus.base.prompt import encode_prompt
from orthrus.errors import UserInputError
from orthrus.training.adapt import (
    SHARES,
    Counts,
    Logged,
    forgets,
    go_part_of_the_way,
    judge,
    read_log,
    split,
    write_corpus,
)
from orthrus.training.corpus import read_corpus
from orthrus.training.replaced_views import put_in_place, roll_back

TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
WORDS = "abcdefghijklmnopqrstuvwxyz"


def base_of() -> Any:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return SimpleNamespace(
        tokenizer=tokenizer,
        eos_token_ids=frozenset({2}),
        encode_prompt=lambda prompt: encode_prompt(tokenizer, prompt),
    )


def write_log(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def some(number: int) -> list[dict[str, Any]]:
    return [{"prompt": f"say {WORDS[i]}"} for i in range(number)]


def test_a_log_gives_each_request_once_with_its_answer_where_it_has_one(tmp_path: Path) -> None:
    base = base_of()
    answered = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it"}]
    asked = [*answered, {"role": "user", "content": "again"}]
    records = [
        {"messages": answered},
        {"messages": asked},
        {"prompt": "Say A"},
        *some(19),
        {"prompt": "x" * 300},
    ]
    found = read_log(write_log(tmp_path / "log.jsonl", records), base, most_tokens=100)
    assert len(found) == 2 + 19
    assert found[0].prompt_ids == tuple(base.encode_prompt("say it"))
    assert found[0].answer_ids == (*base.tokenizer("it")["input_ids"], 2)
    assert found[1].prompt_ids == tuple(base.encode_prompt(asked))
    assert found[1].answer_ids is None


def test_requests_with_built_in_prompts_are_left_out(tmp_path: Path) -> None:
    """The general set consists of them, and would no longer show what a view forgot."""
    built_in = next(p.prompt for p in load_prompts() if isinstance(p.prompt, str))
    records = [
        *some(20),
        {"prompt": built_in},
        {"messages": [{"role": "user", "content": f"Hello! {built_in}"}]},
    ]
    assert len(read_log(write_log(tmp_path / "log.jsonl", records), base_of(), most_tokens=9999)) == 20
    with pytest.raises(UserInputError, match=r"has 19 different requests .* no built-in prompts"):
        read_log(write_log(tmp_path / "log.jsonl", records[1:]), base_of(), most_tokens=9999)


def test_an_answer_gets_the_room_that_a_long_request_leaves(tmp_path: Path) -> None:
    orthrus = tiny_orthrus()
    requests = [Logged(tuple(tiny_prompt(12, i)), None) for i in range(3)]
    write_corpus(
        orthrus.base,
        orthrus.engine,
        requests,
        tmp_path,
        max_new_tokens=20,
        most_tokens=17,
        source="log.jsonl",
    )
    samples = list(read_corpus(tmp_path))
    assert samples
    assert {len(sample.answer_ids) for sample in samples} == {5}
    # A request with no room at all is no request.
    asked = tuple(base_of().encode_prompt("say a"))
    log = write_log(tmp_path / "log.jsonl", some(20))
    assert len(read_log(log, base_of(), most_tokens=len(asked) + 1)) == 20
    with pytest.raises(UserInputError, match="has 0 different requests"):
        read_log(log, base_of(), most_tokens=len(asked))


def test_part_of_the_way_lies_between_what_a_view_knew_and_what_it_learnt() -> None:
    dual = tiny_dual(block_size=4, mask_token_id=None)
    start = {name: parameter.detach().clone() for name, parameter in dual.view_parameters().items()}
    end = {name: tensor + 2.0 for name, tensor in start.items()}
    for share in (1.0, 0.5, 0.0):
        go_part_of_the_way(dual, start, end, share)
        for name, parameter in dual.view_parameters().items():
            torch.testing.assert_close(parameter, start[name] + 2.0 * share)
    assert SHARES[0] == 1.0
    assert list(SHARES) == sorted(SHARES, reverse=True)


def test_a_general_set_that_falls_by_more_than_it_may_is_forgotten() -> None:
    old = Counts((100,) * 4, (40,) * 4)
    assert not forgets(old, Counts((98,) * 4, (40,) * 4))
    assert forgets(old, Counts((97,) * 4, (40,) * 4))


def test_a_log_with_too_little_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"has 19 different requests .* at least 20"):
        read_log(write_log(tmp_path / "log.jsonl", some(19) * 2), base_of(), most_tokens=100)


def test_the_held_back_part_is_a_function_of_the_seed(tmp_path: Path) -> None:
    requests = read_log(write_log(tmp_path / "log.jsonl", some(25)), base_of(), most_tokens=100)
    train_on, judged = split(requests, 0.2, 0)
    assert (len(train_on), len(judged)) == (20, 5)
    assert {*train_on, *judged} == set(requests)
    assert split(requests, 0.2, 0) == (train_on, judged)
    assert split(requests, 0.2, 1) != (train_on, judged)


def counts(*tokens_per_cycle: float) -> Counts:
    return Counts(tuple(round(60 * value) for value in tokens_per_cycle), (60,) * len(tokens_per_cycle))


SAME = counts(3.0, 3.0)


@pytest.mark.parametrize(
    ("old", "new", "general", "kept", "reason"),
    [
        ([2.0] * 9, [2.4] * 9, 3.0, True, "gain [+]20.0%, the general set [+]0.0%"),
        ([2.0] * 9, [2.4] * 9, 2.95, True, "the general set -1.7%"),
        ([2.0] * 9, [2.4] * 9, 2.9, False, "general set falls by 3.3%"),
        ([2.0] * 9, [2.0] * 9, 3.0, False, "gain [+]0.0%, less than 1%"),
        ([2.0] * 9, [1.5] * 9, 3.0, False, "gain -25.0%, less"),
        ([2.0] * 9, [4.0, 3.0, *[1.7] * 7], 3.0, False, "which chance may explain"),
    ],
)
def test_a_view_is_kept_where_it_drafts_better_and_forgets_nothing(
    old: list[float], new: list[float], general: float, kept: bool, reason: str
) -> None:
    import re

    verdict = judge(counts(*old), counts(*new), SAME, counts(general, general))
    assert verdict.kept is kept
    assert re.search(reason, verdict.reason)
    assert verdict.gain_low <= verdict.gain + 1e-9


def test_nothing_to_decode_is_no_gain() -> None:
    nothing = Counts((), ())
    assert not judge(Counts((0,), (0,)), Counts((0,), (0,)), nothing, nothing).kept


def view(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "view.safetensors").write_text(text)
    return folder


def content(folder: Path) -> str:
    return (folder / "view.safetensors").read_text()


def test_every_view_that_was_there_stays_beside_the_new_one(tmp_path: Path) -> None:
    served = tmp_path / "served"
    assert put_in_place(view(tmp_path / "a", "first"), served) is None
    assert put_in_place(view(tmp_path / "b", "second"), served) == tmp_path / "served.before-1"
    assert put_in_place(view(tmp_path / "c", "third"), served) == tmp_path / "served.before-2"
    assert content(served) == "third"
    assert roll_back(served) == (tmp_path / "served.before-2", tmp_path / "served.adapted-1")
    assert content(served) == "second"
    assert roll_back(served) == (tmp_path / "served.before-1", tmp_path / "served.adapted-2")
    assert content(served) == "first"
    with pytest.raises(UserInputError, match="nothing to go back to"):
        roll_back(served)
    found = {path.name: content(path) for path in tmp_path.iterdir()}
    assert found == {"served": "first", "served.adapted-1": "third", "served.adapted-2": "second"}
