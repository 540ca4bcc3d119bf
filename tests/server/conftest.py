"""A server around a tiny model, in this process: no socket, no second process."""

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import httpx
import pytest
from tests.tiny import FAMILY_CONFIGS, tiny_dual
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orthrus.api import Orthrus
from orthrus.base.families import context_length
from orthrus.base.loading import Base
from orthrus.base.resolve import Source
from orthrus.engine.engine import EngineConfig
from orthrus.server.app import create_app
from orthrus.server.settings import ServeConfig

T = TypeVar("T")
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant', 'tool') %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
    "{% if shout is defined and shout %}!{% endif %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
END, NUM_IDS, CONTEXT = 2, 300, 1024


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as byte-level tokenizers write them; ids 0 to 2 are special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: 3 + i for i, letter in enumerate(letters)}
    vocab |= {"<pad>": 0, "<s>": 1, "</s>": 2}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "<s>", "</s>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def byte_orthrus(config: EngineConfig | None = None) -> Orthrus:
    """A random model over bytes, whose drafts are partly wrong."""
    settings = copy.deepcopy(FAMILY_CONFIGS["llama"])
    settings.vocab_size = NUM_IDS
    settings.max_position_embeddings = CONTEXT
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILY_CONFIGS, "bytes", settings)
        dual = tiny_dual("bytes", block_size=8, disturb=0.3)
    base = Base(
        name="tiny",
        model=dual.base,
        tokenizer=byte_tokenizer(),
        eos_token_ids=frozenset({END}),
        context_length=context_length(settings),
        family=dual.family,
        source=Source("folder", "tiny"),
    )
    return Orthrus(base, dual, config=config)


@pytest.fixture(scope="session")
def orthrus() -> Orthrus:
    """Shared by tests that do not look at its pages."""
    return byte_orthrus()


@pytest.fixture(scope="module")
def slow():
    """Each pass takes some time, so that answers are open for a while."""
    made = byte_orthrus(EngineConfig(max_running=4))
    step = made.engine.step

    def wait_and_step():
        time.sleep(0.01)
        step()

    made.engine.step = wait_and_step
    return made


def scheduler_of(client):
    return client.service.live.orthrus.engine.scheduler


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


def free_pages(orthrus):
    scheduler = orthrus.engine.scheduler
    return scheduler.pool.num_free + scheduler.prefixes.num_idle


def run(function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """What an async function returns; it must not take more than two minutes."""

    async def bounded() -> T:
        with anyio.fail_after(120):
            return await function(*args)

    return anyio.run(bounded)


@asynccontextmanager
async def serving(orthrus: Orthrus, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a running server; `client.service` is the server's state."""
    app = create_app(lambda: orthrus, ServeConfig(**settings))
    async with app.router.lifespan_context(app):
        await app.state.service.loaded.wait()
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            client.service = app.state.service  # type: ignore[attr-defined]
            client.app = app  # type: ignore[attr-defined]
            yield client


def chat(content: Any = "Hi", **fields: Any) -> dict[str, Any]:
    """A body for the chat endpoint that is quick to answer."""
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        "orthrus": {"strategy": "chain"},
    } | fields


def text(prompt: Any = "Hi", **fields: Any) -> dict[str, Any]:
    """A body for the completions endpoint."""
    body = chat(**fields)
    del body["messages"]
    return {"prompt": prompt} | body


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; checks that it ends as it must."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-1] == ""
    found = [b.removeprefix("data: ") for b in blocks[:-1] if not b.startswith(":")]
    assert found[-1] == "[DONE]"
    return [json.loads(each) for each in found[:-1]]
