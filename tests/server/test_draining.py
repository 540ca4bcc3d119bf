"""The end of a server: what is refused, what may end, and what those who still wait are told."""

import asyncio
import threading

import httpx
import pytest

from orthrus.server.app import create_app
from orthrus.server.settings import ServeConfig

from .conftest import events, free_pages, run, scheduler_of, serving, text, until

TEXT = "/v1/completions"


def test_draining_refuses_new_requests_and_lets_open_ones_end(slow):
    async def check():
        async with serving(slow) as client:
            open_one = asyncio.ensure_future(client.post(TEXT, json=text("Hi", max_tokens=40)))
            await until(lambda: scheduler_of(client).running)
            draining = asyncio.ensure_future(client.service.drain(60.0))
            await asyncio.sleep(0)
            for response in (await client.get("/ready"), await client.post(TEXT, json=text("Hi"))):
                assert response.status_code == 503
                assert response.json()["error"]["code"] == "server_draining"
                assert int(response.headers["retry-after"]) >= 1
            assert (await client.get("/health")).status_code == 200
            await draining
            assert (await open_one).json()["usage"]["completion_tokens"] == 40

    run(check)


def test_the_drain_has_a_deadline_and_every_answer_a_last_event(slow):
    async def check():
        async with serving(slow) as client:
            whole = asyncio.ensure_future(client.post(TEXT, json=text("Hi", max_tokens=240)))
            stream = asyncio.ensure_future(client.post(TEXT, json=text("Ho", max_tokens=240, stream=True)))
            await until(lambda: len(scheduler_of(client).running) == 2)
            await client.service.drain(0.05)
            assert (await whole).status_code == 503
            assert (await whole).json()["error"]["code"] == "server_shutting_down"
            told = events(await stream)
            assert told[-1]["error"]["code"] == "server_shutting_down"
            assert all(e["choices"][0]["finish_reason"] is None for e in told[:-1])
            assert free_pages(slow) == slow.engine.scheduler.pool.num_pages

    run(check)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_server_that_leaves_while_a_request_is_prepared_says_so(orthrus, path):
    async def check():
        app = create_app(lambda: orthrus, ServeConfig())
        async with app.router.lifespan_context(app):
            await app.state.service.loaded.wait()
            live, may_go_on = app.state.service.live, threading.Event()
            for _ in range(4):
                # As many long prompts as are prepared at once.
                live.loop._preparing.submit(may_go_on.wait)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                messages = [{"role": "user", "content": "Hi"}]
                body = {"messages": messages, "max_tokens": 4, "stream": True}
                if path == "/v1/responses":
                    body = {"input": "Hi", "stream": True}
                sent = asyncio.create_task(client.post(path, json=body))
                await until(lambda: live.loop.num_open > 0)
                app.state.service.end_all()
                may_go_on.set()
                answer = await sent
        assert answer.status_code == 503, answer.text
        assert "shutting down" in answer.json()["error"]["message"]

    run(check)
