"""HTTP clients for servers with OpenAI's interface: their key, and whether a proxy stands before them."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from orthrus.errors import UserInputError

Client = TypeVar("Client")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def open_client(
    kind: Callable[..., Client], urls: Iterable[str], api_key: str | None, **options: Any
) -> Client:
    """An httpx client for these servers, which sends them the key. kind: `httpx.Client` or `httpx.AsyncClient`.

    The environment's proxies are not used if all servers are on this machine. Raises UserInputError for a key that no
    header can hold, and for a proxy of the environment that httpx cannot use.
    """
    headers = key_header(api_key)
    trust_env = any(urlsplit(url).hostname not in LOCAL_HOSTS for url in urls)
    try:
        return kind(headers=headers, trust_env=trust_env, **options)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserInputError(
            f"the proxy that the environment names cannot be used ({reason[:200]}); unset ALL_PROXY, HTTP_PROXY and "
            "HTTPS_PROXY, or name one of http."
        ) from error


def key_header(api_key: str | None) -> dict[str, str]:
    """The header with a key; empty without one. Raises UserInputError for a key that no header can hold."""
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise UserInputError("the API key must be printable ASCII; check --api-key, or ORTHRUS_API_KEY.")
    return {"Authorization": f"Bearer {api_key}"}
