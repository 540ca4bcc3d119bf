"""Addresses of servers with OpenAI's interface, as users give them."""

from urllib.parse import urlsplit, urlunsplit

from orthrus.errors import UserInputError


def api_root(url: str, option: str) -> str:
    """The address that paths such as /models are added to: `url` itself, with /v1 where it has no path.

    option: what the user calls it, such as "--url". Raises UserInputError for what is no address of http or https,
    and for one with a name, password, query or fragment, which would stand in reports.
    """
    try:
        parts = urlsplit(url.strip())
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not all(" " < character < "\x7f" for character in url.strip()):
        raise UserInputError(f"{option} is {url!r:.200}; give an address such as http://127.0.0.1:8000.")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserInputError(
            f"{option} holds a name, a password, a query or a fragment, which would stand in reports; give the "
            "address alone, and a key as --api-key or in ORTHRUS_API_KEY."
        )
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") or "/v1", "", ""))
