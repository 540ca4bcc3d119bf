"""Keywords of `generate` that do not exist."""

import pytest
from tests.tiny_orthrus import tiny_orthrus

from orthrus.api import DecodeOptions, decode_config
from orthrus.errors import UserInputError


@pytest.mark.parametrize(
    ("keyword", "told"),
    [
        ("max_tokens", "there is no setting 'max_tokens'; did you mean max_new_tokens?"),
        ("temperatures", "did you mean temperature?"),
        ("qqq", r"see help\(orthrus.api.decode_config\)"),
    ],
)
def test_an_unknown_keyword_is_named_with_what_it_may_mean(keyword: str, told: str) -> None:
    orthrus = tiny_orthrus()
    for prompt in ("x", ["x", "y"]):
        with pytest.raises(UserInputError, match=told):
            orthrus.generate(prompt, **{keyword: 3})  # type: ignore[call-overload]


def test_the_keywords_are_those_of_decode_config() -> None:
    assert DecodeOptions.__annotations__.keys() == decode_config.__kwdefaults__.keys()
