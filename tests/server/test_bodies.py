"""Bodies that are wrong in ways that only JSON can spell, and hosts that a server is called by."""

import json

import pytest
from pydantic import ValidationError

from orthrus.errors import UserInputError
from orthrus.server.params import named
from orthrus.server.schemas import CompletionRequest

from .conftest import chat, run, serving
from .test_refusals import CHAT, JSON, TEXT, check_error


def test_on_a_local_address_other_names_are_kept_out(orthrus):
    """A page whose name leads here reads without an origin: its name stands in the header host alone."""

    async def check():
        async with serving(orthrus, local=True, cors_origins=("http://good",)) as client:
            for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil"):
                for path in ("/v1/models", "/metrics", "/"):
                    refused = await client.get(path, headers={"host": host})
                    check_error(refused, 403, code="host_not_allowed")
                assert (await client.get("/health", headers={"host": host})).status_code == 200
            for host in ("127.0.0.1:8000", "localhost", "[::1]:8000", "good"):
                assert (await client.get("/v1/models", headers={"host": host})).status_code == 200
        async with serving(orthrus, local=True, api_keys=("k",)) as client:
            headers = {"host": "evil.example", "x-api-key": "k"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200

    run(check)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/responses", {"input": "a", "metadata": {"a": "\ud800"}}, "metadata"),
        ("/v1/responses", {"input": "a", "tools": [{"type": "x", "y": ["\ud800"]}]}, "tools"),
        ("/v1/responses", {"input": "a", "metadata": {"\ud800": "a"}}, "metadata"),
        ("/tokenize", {"content": "\ud800"}, "content"),
        (TEXT, {"prompt": "\ud800"}, "prompt"),
        (CHAT, chat() | {"unknown": "\ud800"}, "unknown"),
        (CHAT, chat() | {"chat_template_kwargs": {"a": "\ud800"}}, "chat_template_kwargs"),
    ],
)
def test_half_a_character_anywhere_is_refused_by_the_name_of_its_field(orthrus, path, body, param):
    async def check():
        async with serving(orthrus) as client:
            told = check_error(await client.post(path, content=json.dumps(body), headers=JSON), 400, None)
            assert told.startswith(param)
            assert "half of a character" in told
            assert told.endswith("send whole characters.")

    run(check)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [{}] * 200_000},
        {"prompt": [[]] * 200_000},
        {"prompt": [[-1]] * 200_000},
        {"prompt": ["a"] * 200_000},
        {"prompt": "a", "logit_bias": {str(i): "x" for i in range(200_000)}},
        {"prompt": "a", "stop": [1] * 200_000},
    ],
    ids=lambda fields: str(fields)[:30],
)
def test_of_many_faults_the_first_is_told(orthrus, fields):
    """One for each of a million elements would take minutes, in which nobody else is heard."""

    async def check():
        async with serving(orthrus) as client:
            check_error(await client.post(TEXT, json=fields), 400)

    run(check)
    with pytest.raises(ValidationError) as told:
        CompletionRequest.model_validate(fields)
    assert len(told.value.errors()) <= 4


def test_null_is_not_given(orthrus):
    nulls = dict.fromkeys(("n", "min_tokens", "ignore_eos", "priority", "temperature", "stop", "logit_bias"))

    async def check():
        async with serving(orthrus) as client:
            for path, body in ((CHAT, chat()), (TEXT, {"prompt": "a"})):
                answer = await client.post(path, json=body | nulls)
                assert answer.status_code == 200, answer.text
                assert len(answer.json()["choices"]) == 1

    run(check)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": ""}, "stop: must not be empty."),
        (
            {"stop": -1},
            "stop: must be a text or a list of at most 16 texts, none of them empty or of more than 1024 characters.",
        ),
        ({"tool_choice": "x"}, "tool_choice: must be 'none', 'auto' or 'required'."),
        ({"tool_choice": 5}, "tool_choice: must be 'none', 'auto' or 'required'."),
        (
            {"logit_bias": {"9" * 5000: 1}},
            "logit_bias: must have token ids in digits as keys, and numbers from -100 to 100 as values.",
        ),
        ({"stream_options": 3}, "stream_options: must be a JSON object."),
    ],
)
def test_a_wrong_field_is_told_in_our_words(orthrus, fields, message):
    async def check():
        async with serving(orthrus) as client:
            assert check_error(await client.post(CHAT, json=chat() | fields), 400) == message

    run(check)


def test_equal_prompts_are_drawn_apart_unless_a_seed_is_given(orthrus):
    async def check():
        async with serving(orthrus) as client:

            async def texts(**fields):
                body = {"prompt": ["hello"] * 3, "temperature": 1.0, "max_tokens": 24} | fields
                answer = await client.post(TEXT, json=body)
                return [choice["text"] for choice in answer.json()["choices"]]

            assert len(set(await texts())) > 1
            assert len(set(await texts(seed=1))) == 1
            first = await texts(seed=1, prompt=["hello"], n=2)
            assert await texts(seed=1, prompt=["bye", "hello"], n=2) != first
            assert (await texts(seed=1, prompt=["bye", "hello"], n=2))[2:] == first

    run(check)


def test_a_wrong_request_is_told_what_to_do(orthrus):
    schema: dict = {}
    inner = schema
    for _ in range(300):
        inner["properties"] = {}
        inner = inner["properties"]
    deep = chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})

    async def check():
        async with serving(orthrus) as client:
            told = check_error(await client.post(CHAT, content=b'{"a" 1}', headers=JSON), 400)
            assert (
                told
                == "The body is not valid JSON: Expecting ':' delimiter at character 6; correct it there."
            )
            told = check_error(await client.post(CHAT, content=b"[" * 100_000, headers=JSON), 400)
            assert told == "The body is nested too deeply: use fewer levels."
            told = check_error(await client.post(CHAT, json=deep), 400, "response_format")
            assert told == "response_format.json_schema.schema: is nested too deeply; use fewer levels."
            told = check_error(await client.post(TEXT, json={"prompt": [10**6]}), 400, "prompt")
            assert told.endswith("use ids of its tokenizer.")
            told = check_error(await client.get("/v1/nothing"), 404)
            assert told == "There is nothing at '/v1/nothing': GET /openapi.json lists the paths."
            wrong = await client.get(CHAT)
            assert check_error(wrong, 405) == "GET is not allowed here: use POST."
            assert wrong.headers["allow"] == "POST"

    run(check)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("temperature must be 0 or more.", "temperature"),
        ("temperatures vary.", None),
        ("the json_schema grammar cannot be used: x; correct or simplify it.", "response_format"),
        ("the lark grammar did not compile within 20 s; simplify it.", "tools"),
        ("a token id of logit_bias must be a whole number from 0, not -1.", "logit_bias"),
        ("max_new_tokens must be 1 or more.", "max_tokens"),
    ],
)
def test_an_error_names_the_field_of_the_request(message, param):
    assert named(UserInputError(message)).param == param


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        (
            "/v1/responses",
            '{"input": "Hi", "text": {"format": {"type": "text", "zz": NUMBER}}}',
            "text.format.zz",
        ),
        (CHAT, '{"messages": [{"role": "user", "content": "Hi"}], "zz": [1, NUMBER]}', "zz.1"),
    ],
)
def test_a_number_that_no_answer_can_repeat_is_refused_also_where_nobody_looks(
    orthrus, path, body, place, number
):
    async def check():
        async with serving(orthrus) as client:
            refused = await client.post(path, content=body.replace("NUMBER", number), headers=JSON)
            assert check_error(refused, 400) == f"{place}: must be a finite number."

    run(check)


@pytest.mark.parametrize(("name", "most"), [("node_budget", 256), ("block_budget", 8)])
def test_one_request_cannot_make_a_pass_of_thousands_of_rows(orthrus, name, most):
    async def check():
        async with serving(orthrus) as client:
            ours = {"strategy": "fused_tree", name: most}
            assert (await client.post(CHAT, json=chat(orthrus=ours))).status_code == 200
            refused = await client.post(CHAT, json=chat(orthrus=ours | {name: most + 1}))
            assert f"orthrus.{name}: must be less than or equal to {most}" in check_error(refused, 400)

    run(check)
