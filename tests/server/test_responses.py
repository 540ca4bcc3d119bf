"""/v1/responses and /v1/messages say what the chat interface says, in their own shapes."""

import json

import pytest

from .conftest import chat, run, serving
from .test_tools import SCHEMA, TOOLS

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
OWN = {"temperature": 1, "seed": 3, "orthrus": {"strategy": "chain"}}
FLAT = [{"type": "function"} | tool["function"] for tool in TOOLS]
SCHEMAS = [{"name": t["function"]["name"], "input_schema": t["function"]["parameters"]} for t in TOOLS]
CALLS = {"max_tokens": 200, "ignore_eos": False, "parallel_tool_calls": False, "tool_choice": "required"}


def named_events(response):
    """(name, data) of each event."""
    assert response.status_code == 200, response.text
    blocks = [block.split("\n") for block in response.text.split("\n\n") if block and block[0] != ":"]
    found = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]
    assert all(name == data["type"] for name, data in found)
    return found


def test_responses_say_what_chats_say(orthrus):
    async def check():
        body = {"instructions": "Be kind.", "input": "Hi", "max_output_tokens": 12} | OWN
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        async with serving(orthrus) as client:
            told = (
                await client.post(CHAT, json=chat(ignore_eos=False, **OWN) | {"messages": messages})
            ).json()
            whole = (await client.post(RESPONSES, json=body)).json()
            found = named_events(await client.post(RESPONSES, json=body | {"stream": True}))
        text = told["choices"][0]["message"]["content"]
        (item,) = whole["output"]
        assert item["content"][0]["text"] == text
        finish = told["choices"][0]["finish_reason"]
        assert whole["status"] == ("completed" if finish == "stop" else "incomplete")
        assert whole["usage"]["input_tokens"] == told["usage"]["prompt_tokens"]
        assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
        names = [name for name, _ in found]
        assert names[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert names[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            f"response.{whole['status']}",
        ]
        assert "".join(d["delta"] for n, d in found if n == "response.output_text.delta") == text
        last = found[-1][1]["response"]
        assert [last["status"], last["output"][0]["content"]] == [whole["status"], item["content"]]
        assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]

    run(check)


def test_messages_say_what_chats_say(orthrus):
    async def check():
        turns = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        body = {"system": "Be kind.", "messages": turns, "max_tokens": 12} | OWN
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        async with serving(orthrus) as client:
            told = (
                await client.post(CHAT, json=chat(ignore_eos=False, **OWN) | {"messages": messages})
            ).json()
            whole = (await client.post(MESSAGES, json=body)).json()
            found = named_events(await client.post(MESSAGES, json=body | {"stream": True}))
            counted = await client.post(
                MESSAGES + "/count_tokens", json={"system": "Be kind.", "messages": turns}
            )
        text = told["choices"][0]["message"]["content"]
        assert whole["content"] == [{"type": "text", "text": text}]
        finish = told["choices"][0]["finish_reason"]
        assert whole["stop_reason"] == {"stop": "end_turn", "length": "max_tokens"}[finish]
        prompt = whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"]
        assert prompt == told["usage"]["prompt_tokens"] == counted.json()["input_tokens"]
        assert [n for n, _ in found if n != "content_block_delta"] == [
            "message_start",
            "content_block_start",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert found[0][1]["message"]["usage"]["input_tokens"] == prompt
        assert "".join(d["delta"]["text"] for n, d in found if n == "content_block_delta") == text
        assert found[-2][1]["delta"]["stop_reason"] == whole["stop_reason"]

    run(check)


def test_calls_in_all_interfaces(orthrus):
    pytest.importorskip("llguidance")

    async def check():
        response = {"input": "Hi", "tools": [*FLAT, {"type": "web_search"}], "max_output_tokens": 200} | OWN
        response |= {"tool_choice": "required", "parallel_tool_calls": False}
        message = {
            "messages": [{"role": "user", "content": "Hi"}],
            "tools": SCHEMAS,
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "max_tokens": 200,
        } | OWN
        tools = [
            {"type": "function", "function": {"name": t["name"], "parameters": t["input_schema"]}}
            for t in SCHEMAS
        ]
        async with serving(orthrus) as client:
            told = (await client.post(CHAT, json=chat(tools=TOOLS, **CALLS | OWN))).json()
            bare = (await client.post(CHAT, json=chat(tools=tools, **CALLS | OWN))).json()
            items = (await client.post(RESPONSES, json=response)).json()
            item_events = named_events(await client.post(RESPONSES, json=response | {"stream": True}))
            blocks = (await client.post(MESSAGES, json=message)).json()
            block_events = named_events(await client.post(MESSAGES, json=message | {"stream": True}))
        (call,) = told["choices"][0]["message"]["tool_calls"]
        (item,) = items["output"]
        assert (item["type"], item["status"]) == ("function_call", "completed")
        assert {"name": item["name"], "arguments": item["arguments"]} == call["function"]
        done = [d for n, d in item_events if n == "response.function_call_arguments.done"]
        assert [d["arguments"] for d in done] == [item["arguments"]]
        assert items["status"] == "completed"
        (call,) = bare["choices"][0]["message"]["tool_calls"]
        (block,) = blocks["content"]
        assert (block["type"], blocks["stop_reason"]) == ("tool_use", "tool_use")
        assert [block["name"], block["input"]] == [
            call["function"]["name"],
            json.loads(call["function"]["arguments"]),
        ]
        parts = [d["delta"]["partial_json"] for n, d in block_events if n == "content_block_delta"]
        assert "".join(parts) == call["function"]["arguments"]

    run(check)


def test_histories_with_calls_are_read(orthrus):
    async def check():
        items = [
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Ulm"}'},
            {"type": "function_call_output", "call_id": "1", "output": "rain"},
        ]
        turns = [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Ulm"}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "1", "content": "rain"}],
            },
        ]
        messages = [
            {"role": "user", "content": "Weather?"},
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
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
        ]
        async with serving(orthrus) as client:
            told = (await client.post(CHAT, json=chat(ignore_eos=False) | {"messages": messages})).json()
            response = (
                await client.post(RESPONSES, json={"input": items, "temperature": 0, "max_output_tokens": 12})
            ).json()
            message = (
                await client.post(MESSAGES, json={"messages": turns, "temperature": 0, "max_tokens": 12})
            ).json()
        text = told["choices"][0]["message"]["content"]
        assert response["output"][0]["content"][0]["text"] == text
        assert message["content"][0]["text"] == text

    run(check)


def test_a_stop_sequence_is_told(orthrus):
    async def check():
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40, "temperature": 0}
        async with serving(orthrus) as client:
            text = (await client.post(MESSAGES, json=body)).json()["content"][0]["text"]
            stop = text[5:7]
            cut = (await client.post(MESSAGES, json=body | {"stop_sequences": ["never", stop]})).json()
        assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", stop)
        assert cut["content"][0]["text"] == text[: text.index(stop)]

    run(check)


def test_a_format_for_responses(orthrus):
    pytest.importorskip("llguidance")

    async def check():
        wanted = {"format": {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}}
        body = {"input": "Hi", "text": wanted, "max_output_tokens": 100} | OWN
        async with serving(orthrus) as client:
            told = (await client.post(RESPONSES, json=body)).json()
        assert json.loads(told["output"][0]["content"][0]["text"]).keys() == {"city"}
        assert told["text"]["format"]["schema"] == SCHEMA

    run(check)


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (RESPONSES, {"background": True}, "background"),
        (RESPONSES, {"input": [{"type": "computer_call"}]}, "computer_call"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        (RESPONSES, {"temperature": -1}, "temperature"),
        (RESPONSES, {"orthrus": {"provenance": True}}, "orthrus.provenance"),
        (MESSAGES, {"orthrus": {"provenance": True}}, "orthrus.provenance"),
        (RESPONSES, {"tool_choice": "required"}, "tool_choice"),
        (RESPONSES, {"input": [{"content": "Hi"}]}, "input.0.role"),
        (RESPONSES, {"instructions": "x", "input": [{"role": "no", "content": "Hi"}]}, "input.0.role"),
        (RESPONSES, {"input": [{"type": "reasoning"}, {"role": "no", "content": "Hi"}]}, "input.1.role"),
        (RESPONSES, {"input": [{"type": "function_call", "name": "f", "arguments": "{"}]}, "input.0"),
        (RESPONSES, {"input": [{"type": "function_call", "arguments": "{}"}]}, "input.0.name"),
        (
            RESPONSES,
            {"tools": [{"type": "web_search"}, {"type": "function", "name": "a b"}]},
            "tools.1.function",
        ),
        (
            MESSAGES,
            {
                "system": "x",
                "messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": 3}]}],
            },
            "messages.0.tool_call_id",
        ),
        (
            MESSAGES,
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]},
            "messages.0.name",
        ),
        (MESSAGES, {"max_tokens": 0}, "max_tokens"),
        (MESSAGES, {"messages": []}, "messages"),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        (MESSAGES, {"tools": [{"name": 3, "input_schema": {}}]}, "tools.0"),
        (MESSAGES, {"tool_choice": {"type": "tool"}}, "tool_choice"),
        (MESSAGES, {"model": "other"}, "other"),
    ],
)
def test_what_is_wrong_is_named(orthrus, path, fields, named):
    async def check():
        body = {
            RESPONSES: {"input": "Hi"},
            MESSAGES: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
        }[path]
        async with serving(orthrus) as client:
            response = await client.post(path, json=body | fields)
        assert response.status_code in (400, 404), response.text
        told = response.json()
        assert named in told["error"]["message"]
        if path == MESSAGES:
            assert told["type"] == "error"
            assert told["error"].keys() == {"type", "message"}
        else:
            assert told["error"].keys() == {"message", "type", "param", "code"}

    run(check)


def test_a_key_is_needed_in_the_shape_of_each_interface(orthrus):
    async def check():
        async with serving(orthrus, api_keys=("secret",)) as client:
            refused = await client.post(MESSAGES, json={})
            taken = await client.post(MESSAGES, json={}, headers={"x-api-key": "secret"})
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        assert taken.json()["error"]["type"] == "invalid_request_error"

    run(check)


def test_what_is_stored_nowhere_cannot_be_referred_to(orthrus):
    """Without the item, the model would not read its own answer."""
    said = {"role": "user", "content": "Hi"}
    reference = {"type": "item_reference", "id": "msg_1"}

    async def check():
        async with serving(orthrus) as client:
            refused = await client.post(RESPONSES, json={"input": [said, reference, said]} | OWN)
            thought = reference | {"id": "rs_1"}
            answered = await client.post(
                RESPONSES, json={"input": [said, thought, said], "max_output_tokens": 4} | OWN
            )
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (400, "unsupported_parameter")
        assert "input.1" in error["message"]
        assert "send the whole item" in error["message"]
        assert answered.status_code == 200

    run(check)


def test_an_empty_message_has_an_empty_block_whole_and_streamed(orthrus):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0}

    async def check():
        async with serving(orthrus) as client:
            first = (await client.post(MESSAGES, json=body)).json()["content"][0]["text"][:1]
            body["stop_sequences"] = [first]
            whole = (await client.post(MESSAGES, json=body)).json()
            found = named_events(await client.post(MESSAGES, json=body | {"stream": True}))
        assert whole["content"] == [{"type": "text", "text": ""}]
        names = [name for name, _ in found]
        blocks = ["content_block_start", "content_block_stop"]
        assert names == ["message_start", *blocks, "message_delta", "message_stop"]

    run(check)
