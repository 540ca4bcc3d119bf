"""`orthrus chat --url`: the same chat with a server in the place of the model, ours or another one."""

import asyncio
import functools
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orthrus.api import Orthrus
from orthrus.base.event_stream import event_data
from orthrus.cli.chat_server import ServerPartner
from orthrus.engine.engine import EngineConfig
from orthrus.errors import UserInputError
from orthrus.server.app import create_app
from orthrus.server.settings import ServeConfig

from .conftest import Cli, assert_refused
from .test_chat import answers

URL = ("--url", "http://test")
OPTIONS = ("-n", "12")


class Bridge(httpx.BaseTransport):
    """From a client without an event loop to an application in one; keeps the bodies that it was asked."""

    def __init__(self, folder: str, **settings: Any) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[httpx.Headers] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._app = create_app(
            lambda: Orthrus.load(folder, view="untrained", engine=EngineConfig(max_slots=2048)),
            ServeConfig(**settings),
        )
        self._life = self._app.router.lifespan_context(self._app)
        self._run(self._start())

    async def _start(self) -> None:
        await self._life.__aenter__()
        await self._app.state.service.loaded.wait()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _ask(self, method: str, url: str, headers: Any, content: bytes) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=self._app)) as client:
            return await client.request(method, url, headers=headers, content=content)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        content = request.read()
        self.headers.append(request.headers)
        if content:
            self.asked.append(json.loads(content))
        got = self._run(self._ask(request.method, str(request.url), request.headers, content))
        return httpx.Response(got.status_code, headers=got.headers, content=got.content)

    def stop(self) -> None:
        self._run(self._life.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def use(monkeypatch: pytest.MonkeyPatch, transport: httpx.BaseTransport) -> None:
    """All clients talk through this transport."""
    monkeypatch.setattr(httpx, "Client", functools.partial(httpx.Client, transport=transport))


@pytest.fixture(scope="module")
def bridge(model_folder: str) -> Iterator[Bridge]:
    made = Bridge(model_folder, names=("tiny",))
    yield made
    made.stop()


@pytest.fixture
def server(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> Bridge:
    use(monkeypatch, bridge)
    bridge.asked.clear()
    bridge.headers.clear()
    return bridge


def test_a_server_answers_as_the_model_here_would(cli: Cli, server: Bridge, model_folder: str) -> None:
    run = cli("chat", *URL, *OPTIONS, stdin="hello.\n\nagain\n")
    assert run.code == 0, run.err
    assert run.out == answers(model_folder, "hello.", "again")
    for words in ("server", "http://test/v1", "model", "tiny", "256 tokens"):
        assert words in run.err
    assert run.err.count("tokens/s") == 2
    assert run.err.count("tokens per cycle") == 2
    assert [len(body["messages"]) for body in server.asked] == [1, 3]
    assert server.asked[0]["orthrus"]["strategy"] == "auto"
    assert "top_k" not in server.asked[0]


def test_settings_reach_the_server(cli: Cli, server: Bridge) -> None:
    chosen = ["strategy chain", "temperature 0.5", "seed 3", "stop zz", "copies off"]
    lines = [*(f"/set {each}" for each in chosen), "hello.", "/stats"]
    args = ("--system", "Be brief.", "--top-k", "5", "--logit-bias", "70=-100", "-k", "4")
    run = cli("chat", *URL, *OPTIONS, *args, "--repetition-penalty", "1.1", stdin="\n".join(lines))
    assert run.code == 0, run.err
    (body,) = server.asked
    budgets = {"node_budget": 24, "block_budget": 3}
    assert body["orthrus"] == {"strategy": "chain", "block_size": 4, "copies": False} | budgets
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["seed"], body["top_k"], body["stop"]) == (0.5, 3, 5, ["zz"])
    assert (body["logit_bias"], body["repetition_penalty"]) == ({"70": -100.0}, 1.1)
    assert "1 turn, 12 tokens" in run.err
    assert "acceptance rate" in run.err


def test_compare_asks_plainly_too_and_with_the_same_seed(cli: Cli, server: Bridge, model_folder: str) -> None:
    run = cli("chat", *URL, *OPTIONS, "--compare", "-t", "1", stdin="hello.\n")
    assert run.code == 0, run.err
    assert "the same tokens" in run.err
    ours, plain = server.asked
    assert ours["seed"] == plain["seed"]
    assert (ours["orthrus"]["strategy"], plain["orthrus"]["strategy"]) == ("auto", "ar")
    assert ours["messages"] == plain["messages"]


def test_a_saved_chat_names_the_server(cli: Cli, server: Bridge, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    cli("chat", *URL, *OPTIONS, stdin=f"hello.\n/save {file}\n")
    saved = json.loads(file.read_text())
    assert saved["model"] == {"model": "tiny", "url": "http://test/v1"}
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]
    assert saved["stats"][0]["num_tokens"] >= saved["stats"][0]["num_passes"] > 0


def test_what_the_server_refuses_is_told_in_its_words(cli: Cli, server: Bridge) -> None:
    assert_refused(cli("chat", *URL, "-n", "8", stdin=f"{'x' * 400}\n"), "400", "context")
    assert_refused(cli("chat", "other", *URL, stdin="hello.\n"), "404", "other")
    assert_refused(cli("chat", *URL, "--color", stdin="hello.\n"), "--color")
    assert_refused(cli("chat", *URL, "--no-floor", stdin="hello.\n"), "floor")
    assert_refused(cli("chat", *URL, stdin="/set color on\n"), "--color")


def test_a_key_is_sent_and_a_missing_one_named(
    cli: Cli, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Bridge(model_folder, api_keys=("secret",))
    use(monkeypatch, made)
    try:
        assert_refused(cli("chat", *URL, stdin="hello.\n"), "401", "--api-key")
        assert cli("chat", *URL, *OPTIONS, "--api-key", "secret", stdin="hello.\n").code == 0
        monkeypatch.setenv("ORTHRUS_API_KEY", "secret")
        assert cli("chat", *URL, *OPTIONS, stdin="hello.\n").code == 0
        assert made.headers[-1]["authorization"] == "Bearer secret"
    finally:
        made.stop()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--url", "test:8000"], "give an address such as"),
        (["--url", "ftp://test"], "give an address such as"),
        (["--url", "http://"], "give an address such as"),
        (["--url", "http://test", "--dtype", "int8"], "--dtype"),
        (["--url", "http://test", "--view", "untrained"], "--view"),
        (["--url", "http://test", "--attn", "sdpa"], "--attn"),
        (["--url", "http://test", "--api-key", "schlüssel"], "ASCII"),
        (["--url", "http://test", "-t", "-1"], "temperature"),
        (["--api-key", "secret"], "--url"),
    ],
)
def test_wrong_options_are_refused(cli: Cli, server: Bridge, args: list[str], told: str) -> None:
    assert_refused(cli("chat", *args, stdin="hello.\n"), told)
    assert server.asked == []


def test_a_missing_extra_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "httpx", None)
    assert_refused(cli("chat", *URL, stdin="hello.\n"), 'pip install "orthrus-lm[serve]"')


# ------------------------------------------------------------------------------------- other servers


class Pieces(httpx.SyncByteStream):
    """A body that comes in pieces; a function among them is called in its place."""

    def __init__(self, *pieces: bytes | Callable[[], object]) -> None:
        self._pieces = pieces
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, bytes):
                yield piece
            else:
                piece()

    def close(self) -> None:
        self.closed = True


def delta(text: str, finish: str | None = None) -> bytes:
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\r\n\r\n"


DONE = b"data: [DONE]\n\n"


def other_server(
    monkeypatch: pytest.MonkeyPatch, *bodies: httpx.Response | Exception, models: Any = ("theirs",)
) -> list[dict[str, Any]]:
    """A server of somebody else that answers so, one after the other; returns what it is asked."""
    asked: list[dict[str, Any]] = []
    left = iter(bodies)

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            if isinstance(models, httpx.Response):
                return models
            return httpx.Response(200, json={"data": [{"id": name, "owned_by": "them"} for name in models]})
        asked.append(json.loads(request.read()))
        found = next(left)
        if isinstance(found, Exception):
            raise found
        return found

    use(monkeypatch, httpx.MockTransport(handle))
    return asked


def stream(*pieces: bytes | Callable[[], object]) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Pieces(*pieces))


def test_any_server_of_the_interface_will_do(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}\n\n'
    whole = delta("Grüße\u2028und") + b": keepalive\n\n" + delta(" mehr", "stop") + usage + DONE
    # Cut anywhere, characters included.
    pieces = [whole[i : i + 5] for i in range(0, len(whole), 5)]
    asked = other_server(monkeypatch, stream(*pieces))
    run = cli("chat", *URL, stdin="hello.\n")
    assert run.code == 0, run.err
    assert run.out == "Grüße\u2028und mehr\n"
    assert "7 tokens in" in run.err
    assert "(stop)" in run.err
    assert "tokens per cycle" not in run.err
    assert asked[0].keys() == {
        *("model", "messages", "max_tokens", "temperature", "stream", "stream_options"),
    }
    assert asked[0]["model"] == "theirs"


def test_what_only_ours_can_do_is_refused_elsewhere(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = other_server(monkeypatch)
    for args, line in (
        (["--compare"], "hello."),
        (["--strategy", "chain"], "hello."),
        ([], "/set compare on"),
    ):
        assert_refused(cli("chat", *URL, *args, stdin=f"{line}\n"), "no server of Orthrus")
    assert asked == []


def test_a_model_must_be_named_where_there_are_several(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = other_server(monkeypatch, stream(delta("a"), DONE), models=("one", "two"))
    assert_refused(cli("chat", *URL, stdin="hello.\n"), "one, two")
    assert cli("chat", "two", *URL, stdin="hello.\n").code == 0
    assert asked[0]["model"] == "two"
    other_server(monkeypatch, stream(delta("a"), DONE), models=httpx.Response(404))
    assert cli("chat", "three", *URL, stdin="hello.\n").code == 0
    assert_refused(cli("chat", *URL, stdin="hello.\n"), "404")
    other_server(monkeypatch, models=httpx.Response(200, text="<html>"))
    assert_refused(cli("chat", *URL, stdin="hello.\n"), "does not list models")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (httpx.ConnectError("refused"), "no answer from"),
        (httpx.Response(500, text="oops"), "500"),
        (httpx.Response(429, json={"error": {"message": "later.\nplease"}}), "later. please"),
        (httpx.Response(422, json={"detail": "no such field"}), "no such field"),
        (httpx.Response(302, headers={"location": "http://elsewhere"}), "302"),
        (httpx.Response(200, json={"choices": []}), "no events"),
        (stream(b"data: nonsense\n\n"), "no JSON"),
        (stream(delta("a"), b'data: {"error": {"message": "out of memory"}}\n\n'), "out of memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_goes_wrong_is_one_sentence(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, body: httpx.Response | Exception, told: str
) -> None:
    other_server(monkeypatch, body)
    run = cli("chat", *URL, stdin="hello.\n")
    assert run.code == 2
    (line,) = [line for line in run.err.splitlines() if line.startswith("error: ")]
    assert told in line
    assert "Traceback" not in run.err


def test_a_broken_stream_is_told_and_forgotten(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from orthrus.cli import chat as chat_module

    from .test_chat import Typist

    def break_off() -> None:
        raise httpx.ReadError("reset")

    asked = other_server(monkeypatch, stream(delta("half"), break_off), stream(delta("whole", "stop"), DONE))
    monkeypatch.setattr(chat_module, "_editor", lambda: Typist("first", "second"))
    run = cli("chat", *URL, tty=True)
    assert run.code == 0
    assert "error: no answer from" in run.err
    assert run.out.endswith("whole\n")
    assert [m["content"] for m in asked[1]["messages"]] == ["second"]


def test_ctrl_c_stops_the_answer_and_keeps_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    first = Pieces(delta("one "), interrupt, delta("two"), delta("three"), DONE)
    asked = other_server(
        monkeypatch,
        httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=first),
        stream(delta("more", "stop"), DONE),
    )
    run = cli("chat", *URL, stdin="hello.\nand then?\n")
    assert run.code == 0, run.err
    assert run.out == "one \nmore\n"
    assert "(cancelled)" in run.err
    assert first.closed
    assert [m["content"] for m in asked[1]["messages"]] == ["hello.", "one ", "and then?"]


def test_ctrl_c_before_the_first_byte(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "theirs"}]})
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return stream(delta("answer", "stop"), DONE)

    use(monkeypatch, httpx.MockTransport(handle))
    run = cli("chat", *URL, stdin="hello.\nagain\n")
    assert run.code == 0, run.err
    assert run.out == "\nanswer\n"


def test_a_read_that_waits_is_ended_by_closing_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    shut: list[int] = []

    class Socket:
        def shutdown(self, how: int) -> None:
            shut.append(how)
            raise OSError("gone already")

    class Network:
        def get_extra_info(self, name: str) -> Socket:
            assert name == "socket"
            return Socket()

    response = stream(delta("a"), delta("b"), DONE)
    response.extensions["network_stream"] = Network()
    other_server(monkeypatch, response)
    partner = ServerPartner("http://test", None, None)
    decode = {
        **{
            "max_new_tokens": 5,
            "temperature": 0.0,
            "seed": None,
            "top_k": None,
            "top_p": None,
            "min_p": None,
        },
        **{"repetition_penalty": 1.0, "logit_bias": None, "stop": (), "ignore_eos": False, "floor": True},
        **{"strategy": "auto", "block_size": None, "node_budget": 24, "block_budget": 3, "copies": True},
    }
    answering = partner.answer([{"role": "user", "content": "x"}], decode)
    assert next(iter(answering)).text == "a"
    answering.cancel()
    assert [cycle.text for cycle in answering] == []
    assert len(shut) == 1
    assert answering.result.finish_reason == "cancelled"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("https://h/api/v1", "https://h/api/v1"),
    ],
)
def test_addresses(monkeypatch: pytest.MonkeyPatch, given: str, expected: str) -> None:
    seen: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(200, json={"data": [{"id": "m"}]})

    use(monkeypatch, httpx.MockTransport(handle))
    ServerPartner(given, None, None)
    assert seen == [f"{expected}/models"]


def test_events_are_cut_at_line_feeds_only() -> None:
    pieces = ["data: a\u2028", "b\n", ": comment\nda", "ta:c\r\n\r\n", "event: x\ndata: last"]
    assert list(event_data(pieces)) == ["a\u2028b", "c", "last"]


def test_models_without_ids_are_no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    other_server(monkeypatch, models=())
    with pytest.raises(UserInputError, match="none"):
        ServerPartner("http://test", None, None)


def test_an_answer_that_breaks_off_is_no_whole_answer(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    other_server(monkeypatch, stream(delta("Once")))
    run = cli("chat", *URL, stdin="hello.\n")
    assert run.code == 2
    assert run.out.startswith("Once")
    assert "broke off before the answer was complete" in run.err
    assert "(stop)" not in run.err


def test_text_that_is_none_is_one_sentence(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = other_server(monkeypatch)
    assert_refused(cli("chat", *URL, "--system", "\udcff", stdin="hello.\n"), "is not valid text")
    assert_refused(cli("chat", *URL, stdin="a\udcff\n"), "is not valid text")
    assert asked == []
