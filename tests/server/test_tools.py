"""Function calling: calls keep to their form and schema, and reading them does not depend on how they arrive."""

import json
import random

import pytest

from orthrus.decoding.grammar import GrammarCompiler
from orthrus.server.call_reader import CallReader
from orthrus.server.schemas import ChatRequest
from orthrus.server.tools import call_grammar, calling, with_tools

from .conftest import END, NUM_IDS, byte_tokenizer, chat, events, run, serving

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "maxProperties": 0}}},
]
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
STOP = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "stop"}}


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(byte_tokenizer(), {END}, NUM_IDS)


def taken(compiler, text, *, compact=False, **fields):
    """How much of a text the grammar of such a request takes, and whether the text may end there."""
    body = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **fields}
    )
    state = compiler.state(call_grammar(calling(body), body.response_format, compact=compact))
    for count, token_id in enumerate(byte_tokenizer()(text, add_special_tokens=False)["input_ids"]):
        if not state.mask()[token_id]:
            return count, False
        state.advance(token_id)
    return len(text), bool(state.mask()[END])


@pytest.mark.parametrize(
    ("text", "fields", "ends"),
    [
        ("", {}, True),
        ("Hello <b>", {}, True),
        ("a <tool_call", {}, True),
        ("a <tool_call>", {}, False),
        (WEATHER, {}, True),
        ("Let me see.\n" + WEATHER, {}, True),
        (f"{WEATHER}\n{STOP}", {}, True),
        ("", {"tool_choice": "required"}, False),
        (STOP, {"tool_choice": "required"}, True),
        (STOP, {"tool_choice": NAMED}, True),
        (WEATHER, {"response_format": {"type": "json_object"}}, True),
        ('{"a": 1}', {"response_format": {"type": "json_object"}}, True),
    ],
)
def test_what_the_grammar_takes(compiler, text, fields, ends):
    assert taken(compiler, text, **fields) == (len(text), ends)


@pytest.mark.parametrize(
    ("text", "fields", "most"),
    [
        (WEATHER + " ", {}, len(WEATHER)),
        (f"{WEATHER}\n{STOP}", {"parallel_tool_calls": False}, len(WEATHER)),
        ("Hi", {"tool_choice": "required"}, 0),
        (WEATHER, {"tool_choice": NAMED}, WEATHER.index("weather")),
        (WEATHER.replace("city", "town"), {}, WEATHER.index("city")),
        (WEATHER.replace("Ulm", "Berlin"), {}, WEATHER.index("Ulm") + 4),
        ("Hi", {"response_format": {"type": "json_object"}}, 0),
    ],
)
def test_what_the_grammar_refuses(compiler, text, fields, most):
    assert taken(compiler, text, **fields)[0] == most


def read(pieces):
    """Text and calls that a reader finds, with the arguments of each call joined."""
    reader, content, calls = CallReader(), "", []
    for piece in [*map(reader.feed, pieces), reader.flush()]:
        content += piece.content
        for call in piece.calls:
            if call.name is not None:
                calls.append((call.name, ""))
            assert call.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + call.arguments)
    return content, calls


def test_reading_does_not_depend_on_the_pieces():
    text = f"See <tool_cal <tool> {WEATHER}\n{STOP}"
    assert read([text]) == ("See <tool_cal <tool> ", [("weather", '{"city": "Ulm"}'), ("stop", "{}")])
    rng = random.Random(0)
    for end in range(len(text) + 1):
        wanted = read([text[:end]])
        for _ in range(5):
            cuts = sorted(rng.choices(range(end + 1), k=6))
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, end], strict=True)]
            assert read(pieces) == wanted


def test_what_is_cut_short_keeps_what_there_was():
    assert read(["Hi <tool_"]) == ("Hi <tool_", [])
    assert read([WEATHER[:20]]) == ("", [])
    assert read([WEATHER[: WEATHER.index("Ulm") + 2]]) == ("", [("weather", '{"city": "Ul')])
    assert read([WEATHER[:-3]]) == ("", [("weather", '{"city": "Ulm"}')])
    nested = '<tool_call>\n{"name": "f", "arguments": {"a": {"b": 1}'
    assert read([nested]) == ("", [("f", '{"a": {"b": 1}')])


def test_other_templates_read_of_tools_in_the_text():
    body = ChatRequest.model_validate(
        {
            "tools": TOOLS,
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "How is it in Ulm?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city": "Ulm"}'},
                        }
                    ],
                },
                {"role": "tool", "content": "12 degrees", "tool_call_id": "1"},
                {"role": "tool", "content": [{"type": "text", "text": "rain"}], "tool_call_id": "2"},
            ],
        }
    )
    turns = [message.model_dump(exclude_unset=True) for message in body.messages]
    told, tools = with_tools(turns, body.tools, "{{ messages }}")
    assert tools is None
    assert [turn["role"] for turn in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be kind.\n\n")
    assert all(json.dumps(tool) in told[0]["content"] for tool in TOOLS)
    assert told[2]["content"] == WEATHER
    assert told[3]["content"] == (
        "<tool_response>\n12 degrees\n</tool_response>\n<tool_response>\nrain\n</tool_response>"
    )
    native, tools = with_tools(turns, body.tools, "{% if tools %}<tool_call>{% endif %}")
    assert tools == TOOLS
    assert native[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Ulm"}
    assert native[3:] == turns[3:]


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "json_object"}}])
def test_compact_json_in_arguments_and_beside_calls(compiler, fields):
    tight = WEATHER.replace('{"city": "Ulm"}', '{"city":"Ulm"}')
    assert taken(compiler, tight, compact=True, **fields) == (len(tight), True)
    assert taken(compiler, WEATHER, compact=True, **fields)[0] < len(WEATHER)
    if fields:
        assert taken(compiler, '{"a":1}', compact=True, **fields) == (7, True)
        assert taken(compiler, '{"a": 1}', compact=True, **fields)[0] < 8


def test_a_call_whole_and_in_chunks(orthrus):
    pytest.importorskip("llguidance")

    async def check():
        body = chat(tools=TOOLS, tool_choice="required", max_tokens=200, parallel_tool_calls=False)
        body |= {"ignore_eos": False, "temperature": 1, "seed": 3}
        async with serving(orthrus) as client:
            answers = [
                (await client.post(CHAT, json=body | {"orthrus": {"strategy": strategy}})).json()
                for strategy in ("ar", "chain", "auto")
            ]
            pieces = events(await client.post(CHAT, json=body | {"stream": True}))
        (choice,) = answers[0]["choices"]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        (call,) = message["tool_calls"]
        assert (message["content"], call["type"]) == (None, "function")
        arguments = json.loads(call["function"]["arguments"])
        assert arguments.keys() == ({"city"} if call["function"]["name"] == "weather" else set())
        for other in answers[1:]:
            (same,) = other["choices"][0]["message"]["tool_calls"]
            assert same["function"] == call["function"]
        accepted = answers[2]["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"]
        assert accepted > 0
        deltas = [d for e in pieces for c in e["choices"] for d in c["delta"].get("tool_calls", ())]
        assert deltas[0]["id"]
        assert deltas[0]["function"]["name"] == call["function"]["name"]
        assert "".join(d["function"]["arguments"] for d in deltas) == call["function"]["arguments"]
        assert {d["index"] for d in deltas} == {0}
        assert pieces[-1]["choices"][0]["finish_reason"] == "tool_calls"

    run(check)


def test_our_own_calls_come_back(orthrus):
    async def check():
        messages = [
            {"role": "user", "content": "How is it?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "content": "rain", "tool_call_id": "1"},
        ]
        async with serving(orthrus) as client:
            answer = await client.post(
                CHAT, json=chat(tools=TOOLS, tool_choice="none") | {"messages": messages}
            )
            tokens = await client.post("/tokenize", json={"messages": messages, "tools": TOOLS})
            bare = await client.post("/tokenize", json={"messages": messages})
        assert answer.status_code == 200
        assert tokens.json()["count"] > bare.json()["count"]

    run(check)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nope"}}},
            "tool_choice",
        ),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "messages",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages"),
    ],
)
def test_what_is_wrong_is_named(orthrus, fields, param):
    async def check():
        async with serving(orthrus) as client:
            response = await client.post(CHAT, json=chat() | fields)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param

    run(check)


def test_a_schema_that_no_grammar_holds_is_refused(orthrus):
    pytest.importorskip("llguidance")
    parameters = {"type": "object", "properties": {"a": {"type": "string", "format": "no such format"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]

    async def check():
        async with serving(orthrus) as client:
            response = await client.post(CHAT, json=chat(tools=tools))
        assert response.status_code == 400, response.text
        assert "grammar" in response.json()["error"]["message"]

    run(check)
