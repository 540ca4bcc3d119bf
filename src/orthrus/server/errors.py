"""Errors in the formats of OpenAI's and Anthropic's APIs: a status, and an object that says what to do."""

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from random import uniform
from typing import Any

from orthrus.errors import MissingExtraError, OrthrusError, UnsupportedModelError, UserInputError
from orthrus.server.schemas import LONGEST_STOP, MOST_STOPS, OrthrusOptions, PlacedError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "invalid_request_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


ANTHROPIC_PATHS = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_PYDANTIC = re.compile(r"^(Value error, must |[A-Z][a-z]+ should )")
"""The beginning of a message from pydantic on what a field must be."""
_PLAIN = {
    "must be a valid string": "must be a text",
    "must be a valid list": "must be a list",
    "must be a valid boolean": "must be true or false",
    "must be a valid integer": "must be a whole number",
    "must be a valid number": "must be a number",
    "Field required": "is missing; give it",
    " after validation": "",
}
"""Words of pydantic, and plainer ones."""
MOST_NAMED_LEVELS = 3
_FORM = re.compile(r"^(str|int|bool|((list|dict|literal|nullable|union|function-[a-z]+)\[|constrained-).*)$")
"""Pydantic's names for the types that a field may have."""


class ApiError(Exception):
    """An error for the client.

    param: the wrong field. code: for programs. retry_after: seconds. allow: the methods of a path that was asked with
    another one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.allow = retry_after, allow

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        if self.retry_after is not None:
            # Random times keep clients that were refused together from coming back together.
            headers["retry-after"] = str(max(1, round(self.retry_after * uniform(0.75, 1.5))))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.allow is not None:
            headers["allow"] = self.allow
        return headers

    def payload(self, path: str) -> bytes:
        """The body in the format of that path's API, in ASCII: a message may quote text that has no UTF-8 form."""
        body = anthropic_body(self) if path.startswith(ANTHROPIC_PATHS) else self.body
        return json.dumps(body).encode("ascii")


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic's clients read it."""
    otherwise = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status, otherwise)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, message, param=param, code=code)


def refused_place(error: Mapping[str, Any]) -> list[str]:
    """The path of a value that no request may hold, if that is the error; else an empty list."""
    cause = error.get("ctx", {}).get("error")
    return (cause.place or ["body"]) if isinstance(cause, PlacedError) else []


def wrong_field(place: Sequence[str], error: Mapping[str, Any]) -> ApiError:
    """A 400 for a field that pydantic refused, without the field's value. place: the field's path."""
    refused = refused_place(error)
    place = refused or place
    # For a field of several types, pydantic adds the type's name to the path.
    named = [part for part in place if not _FORM.match(part)]
    if error["type"].startswith("recursion_"):
        # Of such a path only the request's own fields help; the rest is deep inside of one.
        field = ".".join(named[:MOST_NAMED_LEVELS])[:200]
        return bad_request(f"{field}: is nested too deeply; use fewer levels.", param=place[0][:80])
    name, said = ".".join(named)[:200], _PYDANTIC.sub("must ", f"{error['msg']}.")
    for theirs, ours in _PLAIN.items():
        said = said.replace(theirs, ours)
    if named[:1] == ["stop"] and error["type"] != "value_error":
        said = (
            f"must be a text or a list of at most {MOST_STOPS} texts, none of them empty or of more than "
            f"{LONGEST_STOP} characters."
        )
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        said = "must be a JSON object."
    if named == ["prompt"] and not refused:
        said = "must be a text, token ids, or a list of texts or of lists of token ids, none of them empty."
    if error["type"] == "extra_forbidden" and place[0] == "orthrus":
        close = get_close_matches(place[-1][:50], OrthrusOptions.model_fields, n=1)
        known = ", ".join(OrthrusOptions.model_fields)
        said = f"there is no such field; {close[0]} may be meant." if close else f"the fields are {known}."
    return bad_request(f"{name}: {said}", param=place[0][:80])


def overloaded() -> ApiError:
    return ApiError(
        429, "All places are taken: try again later.", code="server_is_overloaded", retry_after=2.0
    )


def not_ready(why: str) -> ApiError:
    return ApiError(503, f"The server is {why}: try again later.", code=f"server_{why}", retry_after=5.0)


def as_api_error(error: BaseException) -> ApiError:
    """The error to send for an exception in the server. The message of an unexpected exception is not sent."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserInputError):
        return bad_request(str(error))
    if isinstance(error, MissingExtraError | UnsupportedModelError):
        # Not a 500, because clients retry those, and this server cannot do it at all.
        return bad_request(str(error), code="not_supported_here")
    if isinstance(error, OrthrusError):
        return ApiError(500, str(error), code="model_error")
    return ApiError(
        500, f"An unexpected {type(error).__name__} ended this request; please report it.", code="unexpected"
    )


def param_of(message: str, names: Mapping[str, str]) -> str | None:
    """The client's name of the field that a sentence begins with. names: maps our names of fields to the client's."""
    said = message.lstrip("'`")
    return next((field for own, field in names.items() if re.match(rf"{re.escape(own)}\b", said)), None)
