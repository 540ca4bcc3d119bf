"""Addresses of servers: what is added to one, and what is refused."""

import pytest

from orthrus.base.addresses import api_root
from orthrus.errors import UserInputError


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("http://a:8000", "http://a:8000/v1"),
        (" http://a:8000/ ", "http://a:8000/v1"),
        ("https://a/v1/", "https://a/v1"),
        ("http://a/some/where", "http://a/some/where"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_addresses(given: str, root: str) -> None:
    assert api_root(given, "--url") == root


@pytest.mark.parametrize(
    "given",
    [
        "", "here", "a:8000", "ftp://a", "http://", "http:///v1", "http://a:port", "http://a:0", "http://a:99999",
        "http://a b", "http://[::1", "http://u:p@a", "http://a?key=1", "http://a#part",
        "http://\u00fcber",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(UserInputError, match=r"--url") as caught:
        api_root(given, "--url")
    assert "\n" not in str(caught.value)


def test_a_secret_in_an_address_is_not_repeated() -> None:
    with pytest.raises(UserInputError) as caught:
        api_root("http://me:hunter2@a", "--endpoint")
    assert "hunter2" not in str(caught.value)
    assert "--endpoint" in str(caught.value)
