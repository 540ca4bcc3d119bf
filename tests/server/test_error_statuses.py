"""Which status an error inside the server has: clients try a 5xx again, and must not where it cannot help."""

import pytest

from orthrus.errors import CorruptFileError, MissingExtraError, UnsupportedModelError, UserInputError
from orthrus.server.errors import as_api_error, wrong_field


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UserInputError("n must be at least 1."), 400, None),
        (MissingExtraError('a grammar needs llguidance; run `pip install ...`.'), 400, "not_supported_here"),
        (UnsupportedModelError("a grammar needs a token that ends the text."), 400, "not_supported_here"),
        (CorruptFileError("a file is damaged."), 500, "model_error"),
    ],
)  # fmt: skip
def test_what_this_server_cannot_do_is_the_requests_fault(
    error: Exception, status: int, code: str | None
) -> None:
    told = as_api_error(error)
    assert (told.status, told.code, told.message) == (status, code, str(error))


def test_nothing_of_an_unforeseen_error_is_told() -> None:
    told = as_api_error(RuntimeError("the prompt was: secret"))
    assert told.status == 500
    assert "secret" not in told.message


@pytest.mark.parametrize(
    ("place", "said", "told"),
    [
        (["stop", "0"], "Value error, must not be empty", "stop.0: must not be empty."),
        (["n"], "Input should be a valid integer", "n: must be a whole number."),
        (["input", "str"], "Input should be a valid string", "input: must be a text."),
        (["prompt", "list[constrained-int]"], "List should have at least 1 item after validation, not 0",
         "prompt: must be a text, token ids, or a list of texts or of lists of token ids, none of them empty."),
    ],
)  # fmt: skip
def test_what_a_field_must_be_is_told_in_plain_words(place: list[str], said: str, told: str) -> None:
    error = wrong_field(place, {"msg": said, "type": "value_error"})
    assert (error.message, error.param) == (told, place[0])
