"""The load driver: what it sends, what it measures and how, and what it says of servers of all kinds."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.load_server import Served

from orthrus.base.bench_prompts import BenchPrompt
from orthrus.bench.load import LoadOptions, run_load
from orthrus.bench.load_client import Answer, Ask, LoadClient, asks_of
from orthrus.bench.load_report import LEGEND, LoadReport, load_report
from orthrus.bench.load_runs import Level, Run, arrivals
from orthrus.errors import UserInputError

URL = "http://server:8000"
ASKS = asks_of([BenchPrompt(f"prompt {i}", ("math", "chat")[i % 2]) for i in range(3)], 6, [7])


class Faulty(httpx.AsyncBaseTransport):
    """A good server, but what follows its third chat meets `fault`, so many times."""

    def __init__(self, fault: Callable[[httpx.Request], httpx.Response], times: int = 1) -> None:
        self._good, self._fault, self._left = Served(), fault, times

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if len(self._good.bodies) == 3 and self._left:
            self._left -= 1
            return self._fault(request)
        return await self._good.handle_async_request(request)


def measure(served: httpx.AsyncBaseTransport, **options: Any) -> LoadReport:
    settings = {"url": URL, "asks": ASKS, "levels": [Level(concurrency=2)], "warmup": 0} | options
    return run_load(LoadOptions(**settings), transport=served)


def test_arms_get_the_same_requests_and_take_turns() -> None:
    served = Served()
    report = measure(served, strategies=["ar", "auto"], repeats=2, check=False, salt=False, seed=5)
    # Behind a probe of each arm.
    sent = served.bodies[2:]
    runs = [sent[at : at + 6] for at in range(0, 24, 6)]
    assert [{b["orthrus"]["strategy"] for b in run} for run in runs] == [{"ar"}, {"auto"}, {"auto"}, {"ar"}]
    for run in runs:
        assert sorted(b["seed"] for b in run) == list(range(5, 11))
        texts = {b["seed"]: b["messages"][0]["content"] for b in run}
        assert [texts[5 + i] for i in range(6)] == [f"prompt {i % 3}" for i in range(6)]
    assert [(row["arm"], row["num_ok"]) for row in report.rows] == [("ar", 12), ("auto", 12)]
    assert len(report.requests) == 24
    assert all(b["stream_options"] == {"include_usage": True} and b["return_token_ids"] for b in sent)


def test_salt_parts_the_prompts_of_runs_but_keeps_the_system_prompt() -> None:
    served = Served()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    measure(served, asks=[Ask(messages, 4)], strategies=["ar", "auto"], check=False, seed=3)
    found = [[m["content"] for m in body["messages"]] for body in served.bodies[2:]]
    assert found == [["Be brief.", "E3.1: Why?"], ["Be brief.", "F3.2: Why?"]]
    assert messages[1]["content"] == "Why?"


def test_a_closed_loop_keeps_as_many_open_as_asked() -> None:
    served = Served(delay=0.002)
    report = measure(served, levels=[Level(concurrency=3)], check=False)
    assert served.most_open == 3
    (row,) = report.rows
    assert row["concurrency_peak"] == 3
    assert 2.0 < row["concurrency_mean"] <= 3.01


def test_arrivals_are_drawn_from_the_seed() -> None:
    times = arrivals(50.0, 2000, "a")
    assert times == arrivals(50.0, 2000, "a")
    assert times[:3] != arrivals(50.0, 2000, "b")[:3]
    assert times[0] == 0.0
    assert times == sorted(times)
    assert 50.0 * times[-1] / 1999 == pytest.approx(1.0, abs=0.1)


def test_random_arrivals_do_not_wait_for_answers() -> None:
    served = Served(delay=0.05)
    report = measure(served, levels=[Level(rate=500.0)], check=False)
    assert served.most_open == 6
    assert report.rows[0]["level"] == "500 a second"
    sent = sorted(record["sent_s"] for record in report.requests)
    due = arrivals(500.0, 6, "0/500 a second/0")
    assert all(at >= planned for at, planned in zip(sent, due, strict=True))


def test_every_answer_is_compared_with_the_same_request_alone() -> None:
    served = Served()
    report = measure(served, strategies=["auto"], repeats=2, salt=False)
    assert (report.rows[0]["num_checked"], report.num_different) == (12, 0)
    # Greedy: three prompts, whatever the seed and the repeat.
    alone = served.bodies[1 + 12 :]
    assert [body["orthrus"]["strategy"] for body in alone] == ["ar"] * 3
    assert "decoded plainly" in report.options["check"]


def test_sampled_answers_are_compared_by_seed() -> None:
    def ids(body: dict[str, Any], number: int) -> list[int]:
        return [body["seed"]] * body["max_tokens"]

    served = Served(ids=ids)
    report = measure(served, temperature=1.0, salt=False)
    assert (report.rows[0]["num_checked"], report.num_different) == (6, 0)
    assert len(served.bodies) == 1 + 6 + 6


def test_an_answer_that_load_changed_is_counted() -> None:
    def ids(body: dict[str, Any], number: int) -> list[int]:
        return [1, 2, 3, 4 + (number == 3)]

    report = measure(Served(ids=ids))
    assert (report.rows[0]["num_checked"], report.num_different) == (6, 1)
    assert sum(record["is_equal"] is False for record in report.requests) == 1
    assert "1 of 6 answers differ" in report.to_table()
    assert "Different:                               1" in report.to_table()


def test_another_server_is_asked_nothing_of_ours() -> None:
    served = Served(is_orthrus=False, has_ids=False)
    report = measure(served)
    assert not any("orthrus" in body for body in served.bodies)
    (row,) = report.rows
    assert (row["output_tokens"], row["input_tokens"], row["num_checked"]) == (42, 42, 0)
    assert (row["acceptance_length"], row["tokens_per_forward"]) == (None, None)
    assert report.options["check"] == "off, because the server does not return token ids (return_token_ids)"
    assert "Speculative" not in report.to_table()
    assert row["ttft_ms"] is not None


def test_another_server_that_tells_ids_is_checked_against_itself() -> None:
    served = Served(is_orthrus=False)
    report = measure(served)
    assert (report.rows[0]["num_checked"], report.num_different) == (6, 0)
    assert not any("orthrus" in body for body in served.bodies)
    assert "plainly" not in report.options["check"]


def test_a_server_that_refuses_unknown_fields_is_asked_without_them() -> None:
    served = Served(is_strict=True, is_orthrus=False)
    report = measure(served)
    assert ["return_token_ids" in body for body in served.bodies] == [True] + [False] * 7
    assert report.rows[0]["num_ok"] == 6


def test_refusals_and_failures_are_counted_apart() -> None:
    def status(number: int) -> int:
        return {2: 429, 4: 500}.get(number, 200)

    report = measure(Served(status=status), check=False)
    (row,) = report.rows
    assert (row["num_ok"], row["num_refused"], row["num_failed"], row["output_tokens"]) == (4, 1, 1, 28)
    assert {r["reason"] for r in report.requests} == {None, "429 not now", "500 not now"}
    assert "Refused requests (429):                  1" in report.to_table()


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b'data: {"error": {"message": "broken"}}\n\ndata: [DONE]\n\n', "broken"),
        (b"data: [DONE]\n\n", "the stream ended before the answer did"),
        (b"data: {half\n\n", "JSONDecodeError"),
        (b'data: {"choices": 5}\n\n', "TypeError"),
        (b'data: {"choices": [3], "usage": 4}\n\n', "the stream ended"),
    ],
)
def test_a_stream_that_breaks_is_a_failure(stream: bytes, reason: str) -> None:
    report = measure(Faulty(lambda request: httpx.Response(200, content=stream)), check=False)
    assert report.rows[0]["num_failed"] == 1
    (told,) = (r["reason"] for r in report.requests if r["reason"])
    assert reason in told


def test_separators_inside_a_text_end_no_line() -> None:
    text = 'data: {"choices": [{"delta": {"content": "a\u2028b\x85c"}, "finish_reason": "stop"}], '
    stream = (text + '"usage": {"prompt_tokens": 1, "completion_tokens": 3}}\n\ndata: [DONE]\n\n').encode()
    (row,) = measure(Faulty(lambda request: httpx.Response(200, content=stream)), check=False).rows
    assert (row["num_ok"], row["num_failed"]) == (6, 0)


@pytest.mark.parametrize(("num_lost", "num_failed"), [(1, 0), (2, 1)])
def test_a_kept_connection_that_the_server_closed_is_tried_once_more(num_lost: int, num_failed: int) -> None:
    lost: list[bytes] = []

    def close(request: httpx.Request) -> httpx.Response:
        lost.append(request.content)
        raise httpx.RemoteProtocolError("Server disconnected without sending a response.")

    report = measure(Faulty(close, num_lost), check=False, levels=[Level(concurrency=1)])
    assert len(set(lost)) == 1
    assert report.rows[0]["num_failed"] == num_failed
    assert report.rows[0]["num_ok"] == 6 - num_failed
    assert report.rows[0]["num_repeated"] == 1


STREAM = b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(STREAM), STREAM)


@pytest.mark.parametrize(
    ("fault", "is_new", "num_seen", "is_ok"),
    [
        (b"", False, 3, True),
        (b"HTTP/9 nonsense\r\n\r\n", False, 2, False),
        (b"", True, 1, False),
    ],
)
def test_only_what_nobody_answered_over_a_kept_connection_is_sent_again(
    tmp_path: Path, fault: bytes, is_new: bool, num_seen: int, is_ok: bool
) -> None:
    async def ask() -> tuple[int, Answer]:
        seen: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while request := await reader.read(1 << 16):
                seen.append(request)
                fails = len(seen) == (1 if is_new else 2)
                writer.write(fault if fails else WHOLE)
                await writer.drain()
                if fails:
                    break
            writer.close()

        path = str(tmp_path / "server")
        async with await asyncio.start_unix_server(serve, path):
            transport = httpx.AsyncHTTPTransport(uds=path)
            async with httpx.AsyncClient(transport=transport, base_url="http://there/v1/") as http:
                client = LoadClient(http, "tiny", temperature=0.0, ignore_eos=False, timeout=10.0)
                for seed in range(1 if is_new else 2):
                    answer = await client.answer(Ask([{"role": "user", "content": "?"}], 4), seed, None)
        return len(seen), answer

    found, answer = asyncio.run(ask())
    assert (found, answer.status == "ok", answer.was_repeated) == (num_seen, is_ok, is_ok)


def test_an_answer_that_does_not_come_is_given_up() -> None:
    report = measure(Served(delay=0.01), check=False, timeout=0.5)
    assert report.rows[0]["num_ok"] == 6
    with pytest.raises(UserInputError, match=r"did not answer a first request \(no answer within 0\.02"):
        measure(Served(delay=0.1), timeout=0.02)


def answer(sent: float, times: list[float], num_tokens: int, **fields: Any) -> Answer:
    found = Answer(Ask([], 8, fields.pop("kind", "chat")), 0, sent, sent=sent, ended=times[-1], times=times)
    found.num_tokens, found.num_prompt_tokens, found.token_ids = num_tokens, 10, [1] * num_tokens
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def figures(answers: list[Answer], **limits: float) -> dict[str, Any]:
    run = Run(Level(concurrency=2), "ar", 0, 100.0, tuple(answers))
    options = LoadOptions(url=URL, asks=ASKS, levels=[run.level], strategies=["ar"], **limits).to_dict()
    return load_report([run], {}, options | {"check": "off"}, secret=None).rows[0]


def test_the_formulas() -> None:
    drafting = {"num_spec_steps": 4, "num_accepted_draft_tokens": 6, "num_draft_tokens": 8}
    metrics = {"speculative_decoding": drafting, "orthrus": {"passes": 4}}
    first = answer(100.0, [100.1, 100.2, 100.5], 5, metrics=metrics, num_cached_tokens=4)
    second = answer(101.0, [101.3, 102.0], 3, kind="code")
    refused = Answer(Ask([], 8), 0, 101.0, sent=101.5, ended=101.6, status="refused")
    row = figures([first, second, refused], ttft_limit_ms=200.0, tpot_limit_ms=150.0)
    assert row["duration_s"] == pytest.approx(2.0)
    assert row["ttft_ms"]["mean"] == pytest.approx(200.0)
    assert row["tpot_ms"]["mean"] == pytest.approx((100.0 + 350.0) / 2)
    assert row["itl_ms"]["mean"] == pytest.approx((100.0 + 300.0 + 700.0) / 3)
    assert row["itl_ms"]["median"] == pytest.approx(300.0)
    assert row["e2e_ms"]["mean"] == pytest.approx((500.0 + 1000.0) / 2)
    assert row["e2e_ms"]["p99"] == pytest.approx(995.0)
    assert row["requests_per_second"] == pytest.approx(1.0)
    assert row["output_tokens_per_second"] == pytest.approx(4.0)
    assert row["total_tokens_per_second"] == pytest.approx(14.0)
    assert row["goodput"] == pytest.approx(0.5)
    assert row["concurrency_mean"] == pytest.approx((0.5 + 1.0 + 0.1) / 2)
    assert row["concurrency_peak"] == 2
    assert row["late_ms"] == pytest.approx(500.0)
    assert row["acceptance_rate"] == pytest.approx(0.75)
    assert row["acceptance_length"] == pytest.approx(2.5)
    assert row["tokens_per_forward"] == pytest.approx(2.0)
    assert row["cached_tokens"] == 4
    assert row["kinds"]["code"]["tpot_ms"]["mean"] == pytest.approx(350.0)
    assert LEGEND.keys() == row.keys() - {"level", "arm", "repeats"}


def test_without_limits_there_is_no_goodput_and_one_token_has_no_time_per_token() -> None:
    row = figures([answer(100.0, [100.1], 1)])
    assert (row["goodput"], row["tpot_ms"], row["itl_ms"]) == (None, None, None)
    # What has no time per token breaks no limit on it.
    assert figures([answer(100.0, [100.1], 1)], tpot_limit_ms=1.0)["goodput"] > 0


def test_all_requests_may_fail_and_there_is_still_a_report() -> None:
    report = measure(Served(status=lambda number: 200 if number == 0 else 429), check=False)
    assert report.rows[0]["num_refused"] == 6
    assert report.rows[0]["to_first_arm"] is None
    assert "Refused requests (429):                  6" in report.to_table()
    assert report.to_csv().count("\n") == 2


def test_the_layout_is_that_of_vllm_and_all_forms_hold_all_arms() -> None:
    report = measure(Served(), strategies=["ar", "auto"])
    lines = report.to_table().splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert "Successful requests:                     6" in lines
    assert "---------------Time to First Token----------------" in lines
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert "-----------Inter-token Latency------------" not in lines
    assert sum(line.startswith("Mean TTFT (ms):                          ") for line in lines) == 2
    assert "=" * 50 in lines
    for text in (report.to_markdown(), report.to_csv()):
        assert "auto" in text
    assert len(report.to_csv().splitlines()) == 3
    whole = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (whole["kind"], len(whole["rows"]), len(whole["requests"])) == ("orthrus-load", 2, 12)
    assert whole["server"] == {"url": f"{URL}/v1", "model": "tiny", "max_model_len": 256, "is_orthrus": True}
    assert "device" not in whole["provenance"]
    assert whole["rows"][0]["to_first_arm"] == 1.0


def test_a_key_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["orthrus", "bench", "serve", "--api-key", "hidden"])
    options = {"api_key": "hidden"}
    report = measure(Served(key="hidden"), **options)
    assert report.rows[0]["num_ok"] == 6
    assert "hidden" not in json.dumps(report.to_dict())
    with pytest.raises(UserInputError, match="--api-key"):
        measure(Served(key="hidden"))
    with pytest.raises(UserInputError, match="401 no key"):
        measure(Served(key="hidden"), model="tiny")


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(UserInputError, match="leave out --strategy"):
        measure(Served(is_orthrus=False), strategies=["auto"])
    with pytest.raises(UserInputError, match="include_usage"):
        measure(Served(has_usage=False, has_ids=False))
    with pytest.raises(UserInputError, match="503 not now"):
        measure(Served(status=lambda number: 503))


@pytest.mark.parametrize(
    "options",
    [
        {"asks": []},
        {"levels": []},
        {"levels": [Level(rate=1.0), Level(rate=1.0)]},
        {"strategies": ["ar", "ar"]},
        {"repeats": 0},
        {"warmup": -1},
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserInputError):
        LoadOptions(**{"url": URL, "asks": ASKS, "levels": [Level(rate=1.0)]} | options)


@pytest.mark.parametrize("fields", [{}, {"rate": 0.0}, {"rate": float("inf")}, {"concurrency": 0}])
def test_wrong_levels_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserInputError):
        Level(**fields)
    with pytest.raises(UserInputError):
        Level(concurrency=1, rate=1.0)


def test_limits_of_answers_and_prompts_go_round() -> None:
    asks = asks_of([BenchPrompt("a", "x"), BenchPrompt([{"role": "user", "content": "b"}])], 4, [1, 2, 3])
    assert [ask.max_tokens for ask in asks] == [1, 2, 3, 1]
    assert [ask.messages[0]["content"] for ask in asks] == ["a", "b", "a", "b"]
    assert [ask.kind for ask in asks] == ["x", "other", "x", "other"]
