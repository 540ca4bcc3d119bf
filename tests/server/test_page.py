"""The page at /, and the records that it draws: where each token comes from."""

import base64
import functools
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orthrus.api import Orthrus
from orthrus.server import page as page_module

from .conftest import chat, events, run, serving

FOLDER = Path(page_module.__file__).parent


def in_loop(test: Callable[..., Any]) -> Callable[..., None]:
    """Runs an async test."""

    @functools.wraps(test)
    def wrapped(**fixtures: Any) -> None:
        run(functools.partial(test, **fixtures))

    return wrapped


@in_loop
async def test_the_page_loads_nothing_from_elsewhere(orthrus: Orthrus) -> None:
    async with serving(orthrus, api_keys=("secret",)) as client:
        found = await client.get("/")
        # The page's shell is open: the key is typed into it.
        assert found.status_code == 200
        assert found.headers["content-type"] == "text/html; charset=utf-8"
        policy = found.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; connect-src 'self'")
        assert "unsafe" not in policy
        assert (await client.get("/v1/models")).status_code == 401
        assert '<p class="soft" id="about"></p>' in found.text, (
            "what is served is told to holders of a key only"
        )
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", found.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy, "browsers would not run it"
    elsewhere = set(re.findall(r"https?://[^\s\"']+", found.text))
    assert elsewhere == {"http://www.w3.org/2000/svg"}, "a name, not an address"
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|style=", found.text)


@in_loop
async def test_the_page_says_what_is_served_where_no_key_is_needed(orthrus: Orthrus) -> None:
    async with serving(orthrus, names=("<best>",)) as client:
        html = (await client.get("/")).text
    assert re.search('<p class="soft" id="about">&lt;best&gt;, float32, [^<]+</p>', html)


@in_loop
async def test_the_page_can_be_left_out(orthrus: Orthrus) -> None:
    async with serving(orthrus, page=False) as client:
        assert (await client.get("/")).status_code == 404


@in_loop
async def test_every_element_that_the_script_uses_is_there_and_has_a_name(orthrus: Orthrus) -> None:
    async with serving(orthrus) as client:
        html = (await client.get("/")).text
    ids = set(re.findall(r'id="([^"]+)"', html))
    assert set(re.findall(r'at\("([a-z-]+)"\)', html)) <= ids
    assert {f"{lane}-{part}" for lane in ("plain", "auto") for part in ("name", "text", "figures")} <= ids
    assert {f"{name}-{part}" for name in ("race", "chat") for part in ("tab", "form")} <= ids
    fields = set(re.findall(r'<(?:input|textarea) id="([^"]+)"', html))
    assert set(re.findall(r'<label for="([^"]+)"', html)) == fields
    assert {"prompt", "message", "tokens", "temperature", "seed", "key"} <= fields
    assert html.count('aria-live="polite"') == 1, "one line speaks, and no token does"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "page.js"
    file.write_text("".join((FOLDER / name).read_text(encoding="utf-8") for name in page_module.SCRIPTS))
    subprocess.run(["node", "--check", str(file)], check=True, timeout=60)


@pytest.mark.parametrize("strategy", ["ar", "chain", "auto"])
@in_loop
async def test_provenance_tells_of_every_token_whether_it_was_drafted(
    orthrus: Orthrus, strategy: str
) -> None:
    body = chat("abc abc abc", max_tokens=40, stream=True)
    options = {"strategy": strategy, "provenance": True}
    async with serving(orthrus) as client:
        found = events(await client.post("/v1/chat/completions", json=body | {"orthrus": options}))
        plain = (await client.post("/v1/chat/completions", json=chat("abc abc abc", max_tokens=40))).json()
    choices = [choice for event in found for choice in event["choices"]]
    records = [choice["orthrus"] for choice in choices if "orthrus" in choice]
    tokens = [token for record in records for token in record["tokens"]]
    assert len(tokens) == plain["usage"]["completion_tokens"] == 40
    ids = [token_id for choice in choices for token_id in choice.get("token_ids", ())]
    assert [token["id"] for token in tokens] == ids
    num_drafts = sum(token["draft"] for token in tokens)
    told = found[-1]["metrics"]
    assert sum(record["passes"] for record in records) == told["orthrus"]["passes"]
    if strategy == "ar":
        assert num_drafts == 0
        assert {record["num_drafted"] for record in records} == {0}
    else:
        assert num_drafts == told["speculative_decoding"]["num_accepted_draft_tokens"]
        assert num_drafts <= sum(record["num_drafted"] for record in records)
    if strategy == "chain":
        assert num_drafts > 0
        for record in records[:-1]:
            drafted = [token for token in record["tokens"] if token["draft"]]
            assert len(drafted) + len(record["rejected"]) == record["num_drafted"]
            # What the model wrote instead is what tells that the first of them is wrong.
            assert record["rejected"][:1] != [{k: record["tokens"][-1][k] for k in ("id", "text")}]
        assert any(record["rejected"] for record in records)


@in_loop
async def test_without_being_asked_no_chunk_tells(orthrus: Orthrus) -> None:
    async with serving(orthrus) as client:
        found = events(await client.post("/v1/chat/completions", json=chat(stream=True)))
    assert all("orthrus" not in choice for event in found for choice in event["choices"])
