"""`orthrus verify`: an answer of a server, saved to a file and made again."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tests.server.conftest import run, serving

from orthrus.api import Orthrus
from orthrus.audit.receipts import digest, shown_texts

from .conftest import Cli, assert_refused


def answer_of(folder: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a server of that model answers."""

    async def ask() -> dict[str, Any]:
        asked = {"orthrus": {"strategy": "chain", "receipt": True}, "seed": 3, "max_tokens": 12} | body
        async with serving(Orthrus.load(folder, view="untrained")) as client:
            response = await client.post(path, json=asked)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    return run(ask)


@pytest.fixture(scope="module")
def answer(model_folder: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return answer_of(model_folder, "/v1/chat/completions", {"messages": messages, "n": 2})


@pytest.fixture
def saved(tmp_path: Path, answer: dict[str, Any]):
    """Writes a changed copy of the answer and returns the file's name."""

    def save(change=lambda content: None) -> str:
        content = copy.deepcopy(answer)
        found = change(content)
        file = tmp_path / "answer.json"
        file.write_text(json.dumps(content if found is None else found))
        return str(file)

    return save


def the_receipt(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["metrics"]["orthrus"]["receipt"]
    return found


def test_an_answer_is_made_again(cli: Cli, saved, model_folder: str) -> None:
    run = cli("verify", saved(), model_folder, "--view", "untrained")
    assert run.code == 0, run.err
    assert run.out.splitlines() == [
        f"text {number} of 2: the 12 tokens are IDENTICAL to those of plain decoding, and its text is the same"
        for number in (1, 2)
    ]


def test_a_bare_receipt_is_enough(cli: Cli, saved, model_folder: str) -> None:
    run = cli("verify", saved(the_receipt), model_folder, "--view", "untrained", "--json", "-q")
    assert run.code == 0, run.err
    told = json.loads(run.out)
    assert told["passed"] is True
    assert [each["identical"] for each in told["texts"]] == [True, True]
    assert [each["text_differs"] for each in told["texts"]] == [None, None]


def test_a_completion_with_its_prompt_echoed(cli: Cli, tmp_path: Path, model_folder: str) -> None:
    file = tmp_path / "answer.json"
    file.write_text(json.dumps(answer_of(model_folder, "/v1/completions", {"prompt": "Once", "echo": True})))
    run = cli("verify", str(file), model_folder, "--view", "untrained")
    assert run.code == 0, run.err
    assert "and its text is the same" in run.out


def test_another_token_is_told_with_its_place(cli: Cli, saved, model_folder: str) -> None:
    def change(content: dict[str, Any]) -> None:
        part = the_receipt(content)["texts"][1]
        part["token_ids"][4] = (part["token_ids"][4] + 1) % 200
        part["digest"] = digest(part["token_ids"])

    run = cli("verify", saved(change), model_folder, "--view", "untrained")
    assert run.code == 1
    first, second = run.out.splitlines()
    assert "IDENTICAL" in first
    assert "DIFFERENT from token 5 of 12 on" in second
    assert "broken rule" in second


def test_another_text_beside_the_right_tokens_is_told(cli: Cli, saved, model_folder: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["choices"][0]["message"]["content"] += "!"

    run = cli("verify", saved(change), model_folder, "--view", "untrained")
    assert run.code == 1
    assert "but the text shown is ANOTHER one" in run.out


def test_the_wrong_model_is_refused(cli: Cli, saved, model_folder: str, other_model_folder: str) -> None:
    assert_refused(
        cli("verify", saved(), other_model_folder, "--view", "untrained"), "weights", "name the model"
    )
    assert_refused(cli("verify", saved()), "a folder or file of the server's")


def test_other_versions_are_refused_unless_they_are_let_in(cli: Cli, saved, model_folder: str) -> None:
    def change(content: dict[str, Any]) -> None:
        the_receipt(content)["versions"]["torch"] = "0.1"

    file = saved(change)
    assert_refused(cli("verify", file, model_folder), "torch 0.1", "--any-version")
    assert cli("verify", file, model_folder, "--view", "untrained", "--any-version").code == 0


def test_wrong_files_are_refused(cli: Cli, saved, tmp_path: Path) -> None:
    assert_refused(cli("verify", str(tmp_path / "none.json")), "cannot read")
    assert_refused(cli("verify", str(tmp_path)), "cannot read")
    file = tmp_path / "wrong.json"
    for content, told in (
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"{}", "no receipt"),
        (b'{"kind": "orthrus-receipt"}', "format"),
    ):
        file.write_bytes(content)
        assert_refused(cli("verify", str(file)), told)

    def damage(content: dict[str, Any]) -> None:
        the_receipt(content)["texts"][0]["prompt_ids"].append(1)

    assert_refused(cli("verify", saved(damage)), "damaged")


def answer_shapes() -> list[tuple[str, dict[str, Any]]]:
    return [
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}], "seed": 3}),
        ("/v1/responses", {"input": "Hello", "max_tokens": None, "max_output_tokens": 12}),
        ("/v1/completions", {"prompt": "Once"}),
    ]


@pytest.mark.parametrize(("path", "body"), answer_shapes(), ids=[path for path, _ in answer_shapes()])
def test_the_text_of_every_kind_of_answer_is_compared(
    cli: Cli, tmp_path: Path, model_folder: str, path: str, body: dict[str, Any]
) -> None:
    content = answer_of(model_folder, path, body)
    file = tmp_path / "answer.json"
    file.write_text(json.dumps(content))
    same = cli("verify", str(file), model_folder, "--view", "untrained")
    assert same.code == 0, same.err
    assert "and its text is the same" in same.out
    (text,) = shown_texts(content)
    # A text before the right one is another text too.
    forged = json.dumps(content).replace(json.dumps(text), json.dumps(f"No! {text}"))
    assert forged != json.dumps(content)
    file.write_text(forged)
    other = cli("verify", str(file), model_folder, "--view", "untrained")
    assert other.code == 1
    assert "but the text shown is ANOTHER one" in other.out


def test_an_answer_with_more_texts_than_its_receipt_is_refused(cli: Cli, saved, model_folder: str) -> None:
    def add(content: dict[str, Any]) -> None:
        content["choices"].append(content["choices"][0])

    assert_refused(
        cli("verify", saved(add), model_folder, "--view", "untrained"), "holds 3 texts", "receipt is of 2"
    )


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ({"kind": "orthrus-receipt"}, []),
        ([], []),
        ({"choices": [{"text": "a"}, {"message": {"content": "b"}}, None]}, ["a", "b", None]),
        ({"choices": [{"message": {"content": "b", "tool_calls": [{}]}}]}, [None]),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ["ab"]),
        ({"content": [{"type": "tool_use"}]}, [None]),
        ({"response": {"output": [{"type": "message", "content": [{"text": "a"}]}]}}, ["a"]),
        ({"output": [{"type": "function_call"}]}, [None]),
    ],
)
def test_the_texts_of_an_answer(content: Any, texts: list[str | None]) -> None:
    assert shown_texts(content) == texts
