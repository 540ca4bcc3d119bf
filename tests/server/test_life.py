"""The life of a request: places, deadlines, clients that leave, and failures."""

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest

from orthrus.engine.engine import EngineConfig
from orthrus.server.app import create_app
from orthrus.server.settings import ServeConfig

from .conftest import CONTEXT, byte_orthrus, chat, events, free_pages, run, scheduler_of, serving, text, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Client:
    """A client at the level of ASGI, which can leave when it likes and read as slowly as it likes."""

    def __init__(self, app: Any, path: str, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self.leave = asyncio.Event()
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.got_bytes = asyncio.Event()
        payload = json.dumps(body).encode()
        self._messages = [{"type": "http.request", "body": payload, "more_body": False}]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json"), (b"host", b"test")],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop()
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.may_read.wait()
        self.sent.append(message)
        if message.get("body"):
            self.got_bytes.set()

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def text(self) -> str:
        return b"".join(m.get("body", b"") for m in self.sent).decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_and_its_pages(slow, stream):
    async def check():
        async with serving(slow) as client:
            loop = client.service.live.loop
            one = Client(client.app, TEXT, text("Hi", max_tokens=200, stream=stream))
            await until(lambda: scheduler_of(client).running)
            (request,) = scheduler_of(client).running
            if stream:
                await one.got_bytes.wait()
            one.leave.set()
            await one.task
            num_tokens = len(request.token_ids)
            await until(lambda: loop.num_open == 0)
            assert request.closed
            assert request.finish == "cancelled"
            # Within the pass in flight and the next one: a cycle of each.
            assert len(request.token_ids) <= num_tokens + 16
            assert not loop.calls
            assert free_pages(slow) == scheduler_of(client).pool.num_pages

    run(check)


def test_a_client_that_leaves_during_its_prompt_is_let_go_before_the_next_chunk():
    orthrus = byte_orthrus(EngineConfig(chunk=16))

    async def check():
        async with serving(orthrus) as client:
            step, num_steps = orthrus.engine.step, 0

            def slow_step():
                nonlocal num_steps
                import time

                num_steps += 1
                time.sleep(0.05)
                step()

            orthrus.engine.step = slow_step
            one = Client(client.app, TEXT, text("x" * 200))
            await until(lambda: num_steps >= 2)
            one.leave.set()
            await one.task
            await until(lambda: client.service.live.loop.num_open == 0)
            assert num_steps <= 5
            assert free_pages(orthrus) == orthrus.engine.scheduler.pool.num_pages

    run(check)


def test_a_client_that_leaves_while_its_request_is_prepared_leaves_nothing_behind(slow, monkeypatch):
    import time

    async def check():
        encode = slow.base.encode_prompt
        monkeypatch.setattr(
            type(slow.base), "encode_prompt", lambda *a, **k: (time.sleep(0.2), encode("Hi", raw=True))[1]
        )
        async with serving(slow) as client:
            one = Client(client.app, TEXT, text("Hi", n=2))
            await until(lambda: client.service.live.loop.num_open == 2)
            one.leave.set()
            await one.task
            await until(lambda: client.service.live.loop.num_open == 0)
            assert free_pages(slow) == slow.engine.scheduler.pool.num_pages

    run(check)


def test_full_is_429_with_a_time_and_every_request_is_answered_once(slow):
    async def check():
        async with serving(slow, max_running=2, max_queue=1) as client:
            bodies = [text("Hi", max_tokens=20, stream=i % 2 == 0) for i in range(8)]
            got = await asyncio.gather(*(client.post(TEXT, json=body) for body in bodies))
            statuses = sorted(r.status_code for r in got)
            assert statuses == [200] * 3 + [429] * 5
            for refused in (r for r in got if r.status_code == 429):
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "server_is_overloaded"
            assert client.service.live.loop.num_open == 0
            assert (await client.post(TEXT, json=text("Hi"))).status_code == 200
            many = await client.post(TEXT, json=text("Hi", n=4))
            assert (many.status_code, many.json()["error"]["param"]) == (400, "n")

    run(check)


def test_a_refused_request_gives_its_place_back(slow):
    async def check():
        async with serving(slow, max_running=1, max_queue=0) as client:
            for _ in range(12):
                wrong = await client.post(TEXT, json=text("x" * CONTEXT))
                assert wrong.json()["error"]["code"] == "context_length_exceeded"
            assert (await client.post(TEXT, json=text("Hi"))).status_code == 200

    run(check)


def test_what_takes_too_long_ends_as_it_stands(slow):
    async def check():
        async with serving(slow, timeout=0.25) as client:
            answer = (
                await client.post(TEXT, json=text("Hi", max_tokens=200, orthrus={"strategy": "ar"}))
            ).json()
            pieces = events(
                await client.post(
                    TEXT, json=text("Hi", max_tokens=200, stream=True, orthrus={"strategy": "ar"})
                )
            )
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["metrics"]["orthrus"]["finish_reasons"] == ["deadline"]
            assert 0 < answer["usage"]["completion_tokens"] < 200
            assert pieces[-1]["choices"][0]["finish_reason"] == "length"
        async with serving(slow, timeout=0.001) as client:
            late = await client.post(TEXT, json=text("Hi"))
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
            (told,) = events(await client.post(TEXT, json=text("Hi", stream=True)))
            assert told["error"]["code"] == "deadline_exceeded"

    run(check)


def test_a_slow_reader_is_dropped_and_nobody_waits_for_it(slow):
    async def check():
        async with serving(slow, max_unread=3) as client:
            one = Client(client.app, TEXT, text("Hi", max_tokens=200, stream=True))
            one.may_read.clear()
            await until(lambda: scheduler_of(client).running)
            other = await client.post(TEXT, json=text("Hi", max_tokens=40))
            assert other.status_code == 200
            await until(lambda: client.service.live.loop.num_open == 0)
            one.may_read.set()
            await one.task
            assert '"code":"slow_reader"' in one.text
            assert one.text.endswith("data: [DONE]\n\n")

    run(check)


def test_a_stream_says_that_it_lives_while_nothing_comes():
    orthrus = byte_orthrus(EngineConfig(chunk=16))

    async def check():
        step = orthrus.engine.step

        def slow_step():
            import time

            time.sleep(0.1)
            step()

        orthrus.engine.step = slow_step
        async with serving(orthrus, keepalive=0.05) as client:
            response = await client.post(TEXT, json=text("x" * 60, max_tokens=1, stream=True))
            assert response.text.count(": keepalive\n\n") >= 2
            assert events(response)[-1]["choices"][0]["finish_reason"] == "length"

    run(check)


def test_a_failing_pass_ends_its_requests_and_the_next_ones_are_answered(caplog):
    orthrus = byte_orthrus()
    run_pass, num_calls = orthrus.engine.runner.hidden, 0

    async def check():
        nonlocal num_calls

        def failing(*args, **kwargs):
            nonlocal num_calls
            num_calls += 1
            if num_calls in (3, 6):
                raise RuntimeError("secret prompt text")
            return run_pass(*args, **kwargs)

        orthrus.engine.runner.hidden = failing
        async with serving(orthrus) as client:
            (*_, told) = events(await client.post(TEXT, json=text("Hi", stream=True)))
            assert told["error"]["code"] == "unexpected"
            whole = await client.post(TEXT, json=text("Hi"))
            assert whole.status_code == 500
            assert "secret" not in whole.text + str(told)
            assert (await client.post(TEXT, json=text("Hi"))).status_code == 200
            assert client.service.live.loop.num_open == 0

    run(check)


def test_a_step_that_always_fails_answers_instead_of_spinning(slow, monkeypatch):
    orthrus = byte_orthrus()

    async def check():
        def failing():
            raise RuntimeError("broken")

        orthrus.engine.step = failing
        async with serving(orthrus) as client:
            got = await asyncio.gather(*(client.post(TEXT, json=text("Hi")) for _ in range(3)))
            assert [r.status_code for r in got] == [500] * 3

    run(check)


def test_seeds_give_the_same_text_alone_and_among_others():
    orthrus = byte_orthrus(EngineConfig(max_slots=1024, max_running=6))

    async def check():
        async with serving(orthrus, max_queue=100) as client:

            def body(i):
                strategy = ("ar", "chain", "fused_tree")[i % 3]
                return text(
                    f"Prompt {i}", temperature=1.0, seed=i, max_tokens=40, orthrus={"strategy": strategy}
                )

            alone = [(await client.post(TEXT, json=body(i))).json()["choices"] for i in range(12)]
            together = await asyncio.gather(*(client.post(TEXT, json=body(i)) for i in range(12)))
            assert [r.json()["choices"] for r in together] == alone

    run(check)


def test_a_pool_of_few_pages_loses_nobody():
    orthrus = byte_orthrus(EngineConfig(max_slots=256, max_running=8))

    async def check():
        async with serving(orthrus, max_queue=100) as client:
            bodies = [text(f"{i} " * 20, max_tokens=60, stream=bool(i % 2)) for i in range(10)]
            got = await asyncio.gather(*(client.post(TEXT, json=body) for body in bodies))
            assert [r.status_code for r in got] == [200] * 10
            assert client.service.live.loop.num_open == 0
            assert free_pages(orthrus) == orthrus.engine.scheduler.pool.num_pages

    run(check)


def test_while_the_model_is_loading_only_health_is_well():

    may_load = threading.Event()

    def load():
        may_load.wait(60)
        return byte_orthrus()

    async def check():
        app = create_app(load, ServeConfig())
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://t") as client,
        ):
            assert (await client.get("/health")).status_code == 200
            for response in (
                await client.get("/ready"),
                await client.get("/v1/models"),
                await client.post(CHAT, json=chat()),
                await client.post("/tokenize", json={"prompt": "x"}),
            ):
                assert response.status_code == 503
                assert response.json()["error"]["code"] == "server_loading"
            assert (await client.get("/metrics")).status_code == 200
            may_load.set()
            await app.state.service.loaded.wait()
            assert (await client.get("/ready")).status_code == 200

    run(check)


def test_a_model_that_cannot_be_loaded_is_told_to_whoever_runs_the_server():
    def load():
        raise ValueError("no model")

    async def check():
        app = create_app(load, ServeConfig())
        left = []
        app.state.service.on_failure = lambda: left.append(True)
        async with app.router.lifespan_context(app):
            await app.state.service.loaded.wait()
        assert left == [True]
        assert str(app.state.service.failure) == "no model"

    run(check)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_the_memory_cannot_hold_is_refused(stream):
    orthrus = byte_orthrus(EngineConfig(max_slots=256))

    async def check():
        async with serving(orthrus) as client:
            (model,) = (await client.get("/v1/models")).json()["data"]
            assert model["max_model_len"] == 256
            refused = await client.post(TEXT, json=text("x" * 300, stream=stream))
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (400, "context_length_exceeded")
            longest = await client.post(TEXT, json=text("x" * 250, max_tokens=100))
            assert longest.json()["usage"]["completion_tokens"] == 256 - 250
            assert longest.json()["choices"][0]["finish_reason"] == "length"

    run(check)


def test_a_thread_that_fails_ends_all_requests_and_stops_the_server(monkeypatch):
    orthrus = byte_orthrus()

    async def check():
        async with serving(orthrus) as client:
            left = []
            client.service.on_failure = lambda: left.append(True)

            def broken(self, request):
                raise AssertionError("a page that nobody owns")

            monkeypatch.setattr(type(orthrus.engine.scheduler), "finish", broken)
            got = await asyncio.gather(*(client.post(TEXT, json=text("Hi")) for _ in range(3)))
            assert [r.status_code for r in got] == [500] * 3
            await until(lambda: left)
            assert str(client.service.failure) == "a page that nobody owns"
            assert (await client.get("/ready")).status_code == 503
            assert (await client.post(TEXT, json=text("Hi"))).status_code == 503

    run(check)


def test_what_timed_out_before_its_first_token_counts_as_failed(slow):
    async def check():
        async with serving(slow, timeout=0.001) as client:
            assert (await client.post(TEXT, json=text("Hi"))).status_code == 504
            told = (await client.get("/metrics")).text
        counts = dict(line.rsplit(" ", 1) for line in told.splitlines() if "request_failure_total" in line)
        assert list(counts.values())[-1] == "1.0"
        assert 'finished_reason="deadline"' not in told

    run(check)


def test_a_client_that_leaves_within_its_body_is_gone_and_not_wrong(orthrus):
    async def check():
        async with serving(orthrus) as client:
            one = Client(client.app, TEXT, text("Hi"))
            one._messages = [{"type": "http.request", "body": b"{", "more_body": True}]
            one.leave.set()
            await one.task
            told = (await client.get("/metrics")).text
        assert 'status="499"} 1.0' in told
        assert 'status="400"' not in told

    run(check)
