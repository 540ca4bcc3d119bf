"""What the interfaces share that turn their requests into chats."""

from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

from orthrus.server.errors import bad_request, wrong_field
from orthrus.server.schemas import ChatRequest


def checked_chat(fields: dict[str, Any], names: dict[str, str]) -> ChatRequest:
    """A chat of these fields. Raises ApiError for the first that is wrong; names: ours -> the client's."""
    if (fields.get("orthrus") or {}).get("provenance"):
        raise bad_request(
            "orthrus.provenance is told by /v1/chat/completions and /v1/completions alone.",
            param="orthrus.provenance",
        )
    try:
        return ChatRequest.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        place[0] = names.get(place[0], place[0])
        raise wrong_field(place, first) from None


def joined_text(content: Any, place: str, *, kinds: Collection[str], part: str) -> str:
    """A text, or the texts of a list of parts, in one piece.

    kinds: types of parts that hold text; part: what the interface calls them. Raises ApiError, which names the
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
