"""Functions for the APIs that convert their requests to chats."""

import json
from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

from orthrus.server.errors import bad_request, wrong_field
from orthrus.server.schemas import ChatRequest
from orthrus.server.tools import call_arguments


def checked_chat(
    fields: dict[str, Any], names: dict[str, str], places: dict[str, list[str]] | None = None
) -> ChatRequest:
    """A chat request of these fields. Raises ApiError for the first field that is wrong.

    names: maps our field names to the client's. places: for each of our lists, the path of every element in the
    client's request.
    """
    if (fields.get("orthrus") or {}).get("provenance"):
        raise bad_request(
            "only /v1/chat/completions and /v1/completions return orthrus.provenance.",
            param="orthrus.provenance",
        )
    try:
        return ChatRequest.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        head, *rest = (str(part) for part in first["loc"])
        if rest and rest[0].isdigit() and head in (places or {}):
            assert places is not None
            head, *more = places[head][int(rest[0])].split(".")
            rest[:1] = more
        raise wrong_field([names.get(head, head), *rest], first) from None


def call_of(name: object, arguments: object, place: str) -> dict[str, Any]:
    """The function of a call. arguments: an object, or its JSON. Raises ApiError, which names the place."""
    param = place.partition(".")[0]
    if not isinstance(name, str) or not name:
        raise bad_request(f"{place}.name: a call needs the name of its function.", param=param)
    known = call_arguments(arguments)
    try:
        written = json.dumps(known, ensure_ascii=False)
    except (ValueError, RecursionError):
        known = None
    if known is None:
        raise bad_request(f"{place}: what a call is given must be a JSON object.", param=param)
    return {"name": name, "arguments": written}


def joined_text(content: Any, place: str, *, kinds: Collection[str], part: str) -> str:
    """A text, or the joined texts of a list of parts.

    kinds: types of parts that hold text. part: the interface's name for a part. Raises ApiError, which names the
    place, for anything else.
    """
    param = place.partition(".")[0]
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{place}: a text, or a list of {part}s, is needed.", param=param)
    texts = []
    for each in content:
        kind, text = (each.get("type"), each.get("text")) if isinstance(each, dict) else (None, None)
        if kind not in kinds or not isinstance(text, str):
            raise bad_request(f"{place}: a {part} of type {ascii(kind)[:60]} cannot be read.", param=param)
        texts.append(text)
    return "".join(texts)
