"""Anthropic's own client for Python, unchanged."""

import anthropic
import pytest

from conftest import KEY, MODEL, QUESTION, WEATHER

ASKED = {"model": MODEL, "max_tokens": 24, "messages": [{"role": "user", "content": "Name three colours."}]}


@pytest.fixture(scope="module")
def client(url):
    return anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0)


def test_a_message_whole_and_streamed(client):
    # The client has no temperature any more; the server takes it.
    fields = ASKED | {"extra_body": {"temperature": 0}}
    whole = client.messages.create(system="Be brief.", **fields)
    with client.messages.stream(system="Be brief.", **fields) as stream:
        final = stream.get_final_message()
    assert whole.content[0].text
    assert final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_tokens_are_counted(client):
    counted = client.messages.count_tokens(model=MODEL, messages=ASKED["messages"])
    usage = client.messages.create(**ASKED).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_tools(client):
    tool = {
        "name": "weather",
        "description": WEATHER["description"],
        "input_schema": WEATHER["parameters"],
    }
    asked = {
        "model": MODEL,
        "max_tokens": 100,
        "tools": [tool],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    messages = [{"role": "user", "content": QUESTION}]
    answer = client.messages.create(messages=messages, **asked)
    (block,) = answer.content
    assert (answer.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "weather")
    assert block.input.keys() == {"city"}
    with client.messages.stream(messages=messages, **asked) as stream:
        assert stream.get_final_message().content[0].input.keys() == {"city"}
    messages += [
        {"role": "assistant", "content": [block.model_dump(exclude_none=True)]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "12 degrees"}],
        },
    ]
    told = client.messages.create(messages=messages, model=MODEL, max_tokens=16, tools=[tool])
    assert told.content


def test_errors(client, url):
    with pytest.raises(anthropic.NotFoundError, match="not served"):
        client.messages.create(**ASKED | {"model": "other"})
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(**ASKED | {"max_tokens": 0})
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0).messages.create(**ASKED)
