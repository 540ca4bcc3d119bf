"""What is wrong is refused by name, in the shape of OpenAI's errors; what comes from outside never makes a 500."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orthrus.server.logs import JsonLines

from .conftest import CONTEXT, chat, events, run, serving, text

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}


def check_error(response, status, param=None, code=None):
    """The error of a response, which has the shape that clients parse."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    return error["message"]


WRONG = [
    ({"functions": []}, "functions"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"guided_json": {}}, "guided_json"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e6}, "temperature"),
    ({"temperature": 1e-9}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"min_tokens": 13}, "min_tokens"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"presence_penalty": -2.5}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {"\u00b2": 1}}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 100}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [100_000]}, "stop_token_ids"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"orthrus": {"compact_json": True}}, "orthrus.compact_json"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object"}}, None),
    ({"orthrus": {"strategy": "magic"}}, "orthrus"),
    ({"orthrus": {"mode": "ar"}}, "orthrus"),
    ({"orthrus": {"block_size": 64}}, "orthrus.block_size"),
    ({"priority": 0.5}, "priority"),
    ({"stream": "yes"}, "stream"),
]
WRONG_CHATS = [
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": 3}, "max_completion_tokens"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages"),
    ({"messages": [{"role": "", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "pirate", "content": "x"}]}, "messages"),
    # A role that there is, and that this template refuses.
    ({"messages": [{"role": "function", "content": "x"}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
    ),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "messages"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
]
WRONG_TEXTS = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [10**6]}, None),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"logprobs": 21}, "logprobs"),
]


def test_wrong_fields_are_refused_by_name(orthrus):
    async def check():
        async with serving(orthrus) as client:
            for fields, param in WRONG + WRONG_CHATS:
                check_error(await client.post(CHAT, json=chat() | fields), 400, param)
            for fields, param in WRONG + WRONG_TEXTS:
                if "chat_template" not in fields:
                    check_error(await client.post(TEXT, json=text() | fields), 400, param)
            assert client.service.live.loop.num_open == 0

    run(check)


def test_the_message_says_what_is_wrong(orthrus):
    async def check():
        async with serving(orthrus) as client:
            image = [{"type": "image_url", "image_url": {"url": "x"}}]
            assert "image_url" in check_error(await client.post(CHAT, json=chat(image)), 400)
            told = check_error(
                await client.post(CHAT, json=chat(messages=[{"role": "function", "content": "x"}])), 400
            )
            assert "no role function" in told
            told = check_error(
                await client.post(CHAT, json=chat(messages=[{"role": "pirate", "content": "x"}])), 400
            )
            assert "role: must be 'system', 'developer'" in told
            told = check_error(
                await client.post(CHAT, json=chat("x" * CONTEXT)), 400, code="context_length_exceeded"
            )
            assert str(CONTEXT) in told
            told = check_error(await client.post(CHAT, json=chat(orthrus={"receipts": True})), 400, "orthrus")
            assert told == "orthrus.receipts: there is no such field; receipt may be meant."
            check_error(await client.post(CHAT, json=chat(model="gpt-4")), 404, "model", "model_not_found")

    run(check)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", None),
        (b"{", "invalid_json"),
        (b"[]", None),
        (b"null", None),
        (b'{"messages": NaN}', None),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', None),
        (b'{"messages": [{"role": "user", "content": "a"}], "top_p": Infinity}', None),
        (b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"1": NaN}}', None),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', None),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}', None),
        (b"[" * 100_000, None),
        (b'{"n": ' + b"9" * 5000 + b"}", None),
    ],
    ids=lambda value: value[:60] if isinstance(value, bytes) else None,
)
def test_bodies_that_are_no_requests(orthrus, body, code):
    async def check():
        async with serving(orthrus) as client:
            for path in (CHAT, TEXT, "/detokenize"):
                check_error(await client.post(path, content=body, headers=JSON), 400, code=code)

    run(check)


def test_what_is_harmless_is_taken(orthrus):
    harmless = [
        {
            "tools": None,
            "tool_choice": "none",
            "best_of": 1,
            "store": False,
            "user": "me",
            "unknown": {"a": 1},
        },
        {"max_tokens": None, "max_completion_tokens": 32_000},
        {"max_tokens": 7, "max_completion_tokens": 7, "temperature": None, "top_p": None, "seed": None},
        {"stream": None, "stop": None, "logit_bias": None, "response_format": {"type": "text"}},
        {"model": "tiny"},
        {"model": "default"},
        {"min_tokens": 12},
    ]

    async def check():
        async with serving(orthrus) as client:
            for fields in harmless:
                answer = await client.post(CHAT, json=chat() | fields)
                assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 12

    run(check)


def test_messages_come_in_many_forms(orthrus):
    async def check():
        async with serving(orthrus) as client:

            async def ids(messages, **fields):
                answer = await client.post("/tokenize", json={"messages": messages} | fields)
                assert answer.status_code == 200, answer.text
                return orthrus.base.tokenizer.decode(answer.json()["tokens"])

            user = {"role": "user", "content": "Hi"}
            parts = {
                "role": "user",
                "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
            }
            assert await ids([user]) == await ids([parts]) == "<u>Hi<a>"
            function = {"name": "f", "arguments": "{}"}
            calls = [{"id": "1", "type": "function", "function": function}]
            call = {"role": "assistant", "content": None, "tool_calls": calls}
            tool = {"role": "tool", "content": "42", "tool_call_id": "1"}
            assert await ids([user, call, tool]) == (
                '<u>Hi<a><tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
                "<u><tool_response>\n42\n</tool_response><a>"
            )
            developer = {"role": "developer", "content": "Be brief"}
            assert await ids([developer, user]) == "<s>Be brief<u>Hi<a>"
            system = {"role": "system", "content": ""}
            assert await ids([system, user]) == "<s><u>Hi<a>"
            assert await ids([system, user, developer]) == "<s>\n\nBe brief<u>Hi<a>"
            assert await ids([user, {"role": "assistant", "content": "Yes"}]) == "<u>Hi<a>Yes"
            assert await ids([user], chat_template_kwargs={"shout": True}) == "<u>Hi!<a>"
            assert await ids([user], chat_template_kwargs={"messages": []}) == "<u>Hi<a>"

    run(check)


def test_tokens_in_both_dialects(orthrus):
    async def check():
        async with serving(orthrus) as client:
            for body in ({"prompt": "Hé"}, {"content": "Hé"}):
                got = (await client.post("/tokenize", json=body)).json()
                assert got["count"] == len(got["tokens"]) == 3
                assert got["max_model_len"] == CONTEXT
                back = (await client.post("/detokenize", json={"tokens": got["tokens"]})).json()
                assert back == {"prompt": "Hé", "content": "Hé"}
            assert (await client.post("/tokenize", json={"content": ""})).json()["tokens"] == []
            check_error(await client.post("/tokenize", json={}), 400)
            check_error(await client.post("/detokenize", json={"tokens": [10**6]}), 400, "tokens")

    run(check)


def test_keys_ids_and_sizes(orthrus, caplog):
    async def check():
        async with serving(orthrus, api_keys=("one", "two"), max_body=4096) as client:
            assert (await client.get("/health")).status_code == 200
            for path in ("/v1/models", "/ready", "/metrics", "/openapi.json", "/nothing"):
                response = await client.get(path)
                check_error(response, 401, code="invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
            for headers in (
                {"authorization": "Bearer three"},
                {"authorization": "Basic one"},
                {"x-api-key": "on"},
            ):
                check_error(await client.post(CHAT, json=chat(), headers=headers), 401)
            for headers in (
                {"authorization": "Bearer one"},
                {"authorization": "bearer two"},
                {"x-api-key": "two"},
            ):
                assert (await client.get("/v1/models", headers=headers)).status_code == 200
            key = {"authorization": "Bearer one"}
            answer = await client.post(CHAT, json=chat(), headers=key | {"x-request-id": "abc-1"})
            assert answer.headers["x-request-id"] == "abc-1"
            assert answer.json()["id"] == "chatcmpl-abc-1"
            odd = await client.get("/health", headers={"x-request-id": "a b" * 100})
            assert odd.headers["x-request-id"] != "a b" * 100
            check_error(await client.post(CHAT, json=chat("x" * 5000), headers=key), 413)

            async def pieces():
                for _ in range(10):
                    yield b" " * 1000

            check_error(await client.post(CHAT, content=pieces(), headers=key | JSON), 413)
            check_error(await client.get("/nothing", headers=key), 404)
            check_error(await client.get(CHAT, headers=key), 405)
            cross = {"origin": "http://evil", "access-control-request-method": "POST"}
            assert "access-control-allow-origin" not in (await client.options(CHAT, headers=cross)).headers
        async with serving(orthrus, cors_origins=("http://good",)) as client:
            for origin, allowed in (("http://good", True), ("http://evil", False)):
                headers = (await client.get("/health", headers={"origin": origin})).headers
                assert ("access-control-allow-origin" in headers) == allowed

    run(check)


def test_pages_of_other_names_are_kept_out(orthrus):
    async def check():
        async with serving(orthrus, cors_origins=("http://good",)) as client:
            for origin in (
                "http://evil",
                "http://evil:8000",
                "null",
                "http://127.0.0.1.evil",
                "http://[",
                "",
            ):
                refused = await client.post(CHAT, json=chat(), headers={"origin": origin})
                assert "--cors-origin" in check_error(refused, 403, code="origin_not_allowed")
            for origin in ("http://good", "http://127.0.0.1:8000", "http://localhost", "http://[::1]:8000"):
                assert (await client.post(CHAT, json=chat(), headers={"origin": origin})).status_code == 200
        async with serving(orthrus, api_keys=("k",)) as client:
            headers = {"origin": "http://evil", "x-api-key": "k"}
            assert (await client.post(CHAT, json=chat(), headers=headers)).status_code == 200

    run(check)


def test_the_document_tells_no_422(orthrus):
    async def check():
        async with serving(orthrus) as client:
            told = (await client.get("/openapi.json")).json()
        operations = [each for methods in told["paths"].values() for each in methods.values()]
        assert all("400" in each["responses"] and "422" not in each["responses"] for each in operations)

    run(check)


def test_the_log_and_the_figures_show_no_text(orthrus, caplog):
    caplog.set_level("INFO", "orthrus.server")

    async def check():
        async with serving(orthrus) as client:
            for _ in range(2):
                await client.post(CHAT, json=chat("Geheimnis", Geheim=1))
            await client.post(CHAT, json=chat("Geheimnis" * CONTEXT))
            page = (await client.get("/metrics")).text
            models = (await client.get("/v1/models")).json()
            card = (await client.get("/v1/models/tiny")).json()
            check_error(await client.get("/v1/models/other"), 404)
        lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
        assert sum(line["event"] == "unknown field ignored" for line in lines) == 1
        assert sum(line.get("path") == CHAT for line in lines) == 3
        assert all(line["status"] in (200, 400, 404) and line["ms"] >= 0 for line in lines if "path" in line)
        assert "Geheimnis" not in json.dumps(lines) + page
        assert models["data"] == [card]
        assert card["max_model_len"] == CONTEXT
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            'request_success_total{finished_reason="length"}',
            "prompt_tokens_total",
            "generation_tokens_total",
            "time_to_first_token_seconds_bucket",
            "request_time_per_output_token_seconds_sum",
            "inter_token_latency_seconds_count",
            "e2e_request_latency_seconds_count",
            "request_queue_time_seconds_count",
            "prefix_cache_hits_total",
            "num_preemptions_total",
            "spec_decode_num_draft_tokens_total",
            "spec_decode_num_accepted_tokens_total",
        ):
            assert f"orthrus_{name}" in page, name
        assert "orthrus_generation_tokens_total 24.0" in page

    run(check)


def test_a_bug_in_a_route_is_a_500_without_its_words(orthrus, monkeypatch):
    async def check():
        async with serving(orthrus) as client:
            monkeypatch.setattr(client.service, "_live", object())
            told = check_error(await client.post(CHAT, json=chat()), 500, code="unexpected")
            assert "AttributeError" in told
            monkeypatch.undo()

    run(check)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [name for fields, _ in WRONG + WRONG_CHATS + WRONG_TEXTS for name in fields]


@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(set(FIELDS) | {"model", "echo", "ignore_eos"})), ANY), max_size=3
    )
)
def test_no_body_makes_a_500(orthrus, changes):
    async def check():
        async with serving(orthrus) as client:
            for path, body in ((CHAT, chat(max_tokens=2)), (TEXT, text(max_tokens=2))):
                payload = json.dumps(body | dict(changes)).encode()
                response = await client.post(path, content=payload, headers=JSON)
                assert response.status_code in (200, 400, 404), (payload, response.text)
                if response.status_code != 200:
                    check_error(response, response.status_code)
                elif response.headers["content-type"].startswith("text/event-stream"):
                    events(response)
                else:
                    assert response.json()["choices"]
            assert client.service.live.loop.num_open == 0

    run(check)


def test_pages_of_an_allowed_origin_may_use_official_clients(orthrus):
    """They send headers of their own, which a browser asks for first."""
    asked = "authorization,content-type,x-stainless-os,anthropic-version,anthropic-dangerous-direct-browser-access"

    async def check():
        async with serving(orthrus, cors_origins=("http://good",)) as client:
            for origin, status in (("http://good", 200), ("http://evil", 400)):
                cross = {"origin": origin, "access-control-request-method": "POST"}
                preflight = await client.options(
                    CHAT, headers=cross | {"access-control-request-headers": asked}
                )
                assert preflight.status_code == status
            assert preflight.status_code == 400

    run(check)
