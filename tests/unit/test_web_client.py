"""Clients of servers: keys that a header can hold, and no proxy between a machine and itself."""

import httpx
import pytest

from orthrus.base.web_client import key_header, open_client
from orthrus.errors import UserInputError


def test_a_key_goes_into_a_header() -> None:
    assert key_header("k") == {"Authorization": "Bearer k"}
    assert key_header(None) == key_header("") == {}
    with pytest.raises(UserInputError, match="printable ASCII"):
        key_header("schl\u00fcssel")


@pytest.mark.parametrize(
    ("urls", "uses_proxy"),
    [
        (["http://127.0.0.1:8000/v1"], False),
        (["http://localhost:8000", "http://[::1]:1"], False),
        (["http://example.org/v1"], True),
        (["http://127.0.0.1", "http://example.org"], True),
    ],
)
def test_local_servers_are_reached_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, urls: list[str], uses_proxy: bool
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    with open_client(httpx.Client, urls, "k") as client:
        assert client.trust_env == uses_proxy
        assert client.headers["authorization"] == "Bearer k"


@pytest.mark.parametrize("proxy", ["socks5://proxy:1080", "nonsense://proxy"])
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UserInputError, match="proxy that the environment names cannot be used"):
        open_client(httpx.Client, ["http://example.org"], None)
    open_client(httpx.Client, ["http://localhost"], None).close()
