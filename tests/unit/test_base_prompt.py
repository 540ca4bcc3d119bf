"""Prompts of every shape that clients send: taken as meant, or refused in one sentence."""

from typing import Any

import pytest
from tests.cli.conftest import byte_tokenizer
from tokenizers import processors

from orthrus.base.prompt import encode_prompt
from orthrus.errors import UserInputError

ASK = {"role": "user", "content": "Capital?"}


def text_of(prompt: Any, **options: Any) -> str:
    tokenizer = byte_tokenizer()
    return str(tokenizer.decode(encode_prompt(tokenizer, prompt, **options)))


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Cap"}, {"type": "input_text", "text": "it"}, "al?"]
    assert text_of([{"role": "user", "content": parts}]) == text_of([ASK])


def test_a_turn_of_tools_has_no_content() -> None:
    turns = [ASK, {"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "3"}]
    assert text_of(turns) == "u:Capital?\na:\nt:3\na:"
    assert text_of([ASK, {"role": "assistant", "tool_calls": [{"id": 1}]}]).endswith("a:\na:")


@pytest.mark.parametrize("begun", ["It is", "It is ", "It\n"])
def test_a_last_turn_of_the_assistant_is_continued(begun: str) -> None:
    assert text_of([ASK, {"role": "assistant", "content": begun}]) == f"u:Capital?\na:{begun}"


def test_a_template_that_trims_loses_the_blank_of_a_continued_turn() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content|trim }};{% endfor %}")
    ids = encode_prompt(tokenizer, [ASK, {"role": "assistant", "content": "It is "}])
    assert tokenizer.decode(ids) == "Capital?;It is"
    silent = byte_tokenizer("{{ messages[0].content }}")
    with pytest.raises(UserInputError, match="leaves out the last message"):
        encode_prompt(silent, [ASK, {"role": "assistant", "content": "It is "}])


def test_a_start_that_was_typed_is_not_added_again() -> None:
    tokenizer = byte_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    assert encode_prompt(tokenizer, "<bos>hi", raw=True) == encode_prompt(tokenizer, "hi", raw=True)
    assert encode_prompt(tokenizer, "hi", raw=True)[:2] != [bos, bos]
    assert encode_prompt(tokenizer, "<bos><bos>hi", raw=True)[:4].count(bos) == 3


def test_a_long_text_is_not_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 8
    encode_prompt(tokenizer, "a" * 100, raw=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "prompt",
    [
        None, 5, b"hi", {"role": "user"}, {"role": "user", "content": "x"}, object(), ["hi"], [5], [None], [[ASK]],
        "half \ud800", "byte \udce9", [{"role": "user", "content": "\ud800"}], [{"role": "\ud800", "content": "x"}],
        [{"role": 5, "content": "x"}], [{"role": None, "content": "x"}], [{"role": "user", "content": 5}],
        [{"role": "user", "content": None}], [{"role": "user", "content": [5]}],
        [{"role": "user", "content": [{"type": "image", "image": "x"}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": {"text": "x"}}],
        [{"role": "user", "content": []}], [{"role": "assistant", "content": None}], iter([ASK]),
        [{"role": "user", "content": [{"type": [], "text": "x"}]}],
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_one_sentence(prompt: Any) -> None:
    with pytest.raises(UserInputError, match=r"^[A-Z].*[.}]$"):
        encode_prompt(byte_tokenizer(), prompt)


@pytest.mark.parametrize("chat_template", [5, {"a": "b"}, {"tool_use": "x", "rag": "y"}, ["a"]])
def test_what_is_no_template_is_one_sentence(chat_template: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    with pytest.raises(UserInputError, match="chat template"):
        encode_prompt(tokenizer, [ASK])
