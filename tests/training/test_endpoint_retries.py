"""Servers that are busy, slow or gone: pauses, several in turn, and when to give up."""

import asyncio
import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from tests.server.conftest import byte_orthrus
from tests.training.endpoint_servers import Scripted, refused, written
from tests.training.test_endpoint import answerer, answers, questions

from orthrus.errors import ModelNotFoundError, UserInputError
from orthrus.training.endpoint_http import Patience, _seconds

ORTHRUS = byte_orthrus()


@pytest.mark.parametrize("status", [408, 409, 425, 429, 502, 503, 504])
def test_what_may_pass_is_asked_again(status: int) -> None:
    replies = iter([refused(status), written("probe"), refused(status), refused(status), written("fine")])
    (answer,) = answers(ORTHRUS, Scripted(lambda _: next(replies)), 1)
    assert answer.token_ids
    assert answer.finished


def test_a_lost_connection_and_a_broken_reply_are_asked_again() -> None:
    steps = iter(["ok", "lost", "no json", "ok"])

    def script(request: httpx.Request) -> httpx.Response:
        match next(steps):
            case "lost":
                raise httpx.ReadError("gone", request=request)
            case "no json":
                return httpx.Response(200, content=b"<html>")
            case _:
                return written("fine")

    (answer,) = answers(ORTHRUS, Scripted(script), 1)
    assert answer.token_ids


def test_retry_after_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await real(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    replies = iter([written("probe"), refused(429, **{"retry-after": "0.3"}), written("fine")])
    answers(ORTHRUS, Scripted(lambda _: next(replies)), 1)
    assert sum(slept) >= 0.25


def test_retry_after_reads_seconds_and_dates() -> None:
    assert _seconds(None) is None
    assert _seconds("soon") is None
    assert _seconds("-3") is None
    assert _seconds("2") == 2.0
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    waited = _seconds(later)
    assert waited is not None
    assert 25 < waited <= 30


def test_a_server_that_stays_silent_ends_the_run_in_one_sentence() -> None:
    replies = iter([written("probe")])
    with pytest.raises(ModelNotFoundError, match=r"gives no answer after 3 attempts \(status 503: down\)"):
        answers(ORTHRUS, Scripted(lambda _: next(replies, None) or refused(503, "down")), 1)

    def nobody(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("All connection attempts failed", request=request)

    with pytest.raises(ModelNotFoundError, match="All connection attempts failed"):
        answers(ORTHRUS, Scripted(nobody), 1)


def test_a_server_that_was_never_reached_is_given_up_sooner() -> None:
    asked = []

    def nobody(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        raise httpx.ConnectError("All connection attempts failed", request=request)

    patience = Patience(attempts=20, first_attempts=2, first_rest=0.01, longest_rest=0.02)
    there = answerer(ORTHRUS, httpx.MockTransport(nobody), patience=patience)
    with there as ask, pytest.raises(ModelNotFoundError, match="after 2 attempts"):
        list(ask(questions(ORTHRUS, 1), max_new_tokens=4))
    assert len(asked) == 2


def test_one_question_that_no_server_can_take_is_left_out() -> None:
    def script(request: httpx.Request) -> httpx.Response:
        prompt = json.loads(request.content)["prompt"]
        return refused(500) if prompt == asked[1].prompt_ids else written("fine")

    asked = questions(ORTHRUS)
    found = answers(ORTHRUS, Scripted(script))
    assert [bool(a.token_ids) for a in found] == [True, False, True]
    assert found[1].left_out == "refused by the server"
    # So is one that the server refuses at once.
    found = answers(
        ORTHRUS,
        Scripted(
            lambda r: (
                refused(400, "too long")
                if json.loads(r.content)["prompt"] == asked[2].prompt_ids
                else written("fine")
            )
        ),
    )
    assert [bool(a.token_ids) for a in found] == [True, True, False]


def test_servers_are_used_in_turn_and_a_dead_one_is_passed_over() -> None:
    scripted = Scripted(lambda r: refused(503) if r.url.host == "three" and dead else written("fine"))
    dead: list[str] = []
    with answerer(ORTHRUS, scripted, "http://one", "http://two", "http://three", concurrency=3) as asked:
        assert len(list(asked(questions(ORTHRUS, 12), max_new_tokens=4))) == 12
        hosts = Counter(r.url.host for r in scripted.asked)
        assert all(4 <= hosts[host] <= 6 for host in ("one", "two", "three"))
        dead.append("three")
        found = list(asked(questions(ORTHRUS, 12), max_new_tokens=4))
    assert all(a.token_ids for a in found)


def test_no_more_questions_than_asked_for_are_on_their_way() -> None:
    running, most = 0, 0

    class Slow(Scripted):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            return await super().handle_async_request(request)

    assert len(answers(ORTHRUS, Slow(lambda _: written("fine")), 20, concurrency=4)) == 20
    assert most == 4


def test_the_model_is_the_only_one_there_or_named() -> None:
    class Two(Scripted):
        names = ("a", "b")

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.url.path == "/v1/models":
                return httpx.Response(200, json={"data": [{"id": name} for name in self.names]})
            return await super().handle_async_request(request)

    with pytest.raises(UserInputError, match=r"serves 2 models \(a, b\); name one with --endpoint-model"):
        answers(ORTHRUS, Two(lambda _: written("fine")))
    scripted = Two(lambda _: written("fine"))
    answers(ORTHRUS, scripted, model="b")
    assert json.loads(scripted.asked[-1].content)["model"] == "b"
    none = Two(lambda _: written("fine"))
    none.names = ()
    with pytest.raises(UserInputError, match="lists no model"):
        answers(ORTHRUS, none)


def test_a_run_that_is_left_cancels_what_is_on_its_way() -> None:
    with answerer(ORTHRUS, Scripted(lambda _: written("fine")), concurrency=2) as asked:
        going = asked(questions(ORTHRUS, 8), max_new_tokens=4)
        next(going)
        going.close()  # type: ignore[attr-defined]
        assert len(list(asked(questions(ORTHRUS, 2), max_new_tokens=4))) == 2


def test_a_server_that_breaks_over_everything_ends_the_run() -> None:
    replies = iter([written("probe")])
    with pytest.raises(ModelNotFoundError, match="gives no answer after 3 attempts"):
        answers(ORTHRUS, Scripted(lambda _: next(replies, None) or refused(500, "broken")), 8)
