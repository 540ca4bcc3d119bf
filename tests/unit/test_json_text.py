"""JSON of others: every text that is none is a ValueError."""

import pytest

from orthrus.base.json_text import parse_json
from orthrus.server.tools import call_arguments


def test_text_and_bytes_are_read() -> None:
    assert parse_json('{"a": [1, null]}') == parse_json(b'{"a": [1, null]}') == {"a": [1, None]}


@pytest.mark.parametrize("text", ["", "{", b"\xff", "[" * 100_000, b'{"a":' * 100_000])
def test_anything_else_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)


def test_a_call_of_a_model_may_nest_without_end() -> None:
    assert call_arguments('{"a": ' + "[" * 100_000) is None
