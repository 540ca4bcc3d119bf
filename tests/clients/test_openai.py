"""OpenAI's own client for Python, unchanged."""

import json
from typing import Annotated

import openai
import pytest
from pydantic import BaseModel, Field

from conftest import KEY, MODEL, QUESTION, WEATHER

MESSAGES = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def ask(client, **fields):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0} | fields
    )


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve(MODEL).id) == (MODEL, MODEL)


def test_a_chat_whole_and_streamed(client):
    answer = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = answer.choices[0].message.content
    assert text
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == answer.usage
    assert answer.usage.completion_tokens == 24


def test_the_strategy_does_not_change_the_text(client):
    texts = {
        ask(client, temperature=1, seed=5, extra_body={"orthrus": {"strategy": s}}).choices[0].message.content
        for s in ("ar", "auto", "tree")
    }
    assert len(texts) == 1


def test_a_seed_and_several_texts(client):
    first, again = (ask(client, temperature=1, seed=3, n=3) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len({*texts}) > 1


def test_a_stop(client):
    text = ask(client).choices[0].message.content
    word = text.split()[3]
    cut = ask(client, stop=[word]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[: text.index(word)], "stop")


def test_log_probs(client):
    choice = ask(client, logprobs=True, top_logprobs=2).choices[0]
    entries = choice.logprobs.content
    assert bytes(b for e in entries for b in e.bytes).decode() == choice.message.content
    assert all(len(e.top_logprobs) == 2 and e.logprob <= 0 for e in entries)


def test_a_completion(client):
    fields = {"model": MODEL, "prompt": "One, two, three,", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text != ""


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools(client, choice):
    fields = {
        "messages": [{"role": "user", "content": QUESTION}],
        "tools": [{"type": "function", "function": WEATHER}],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 100,
    }
    whole = ask(client, **fields).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments).keys() == {"city"}
    with client.chat.completions.stream(model=MODEL, temperature=0, **fields) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    history = [
        *fields["messages"],
        whole.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
    ]
    assert ask(client, messages=history, tools=fields["tools"]).choices[0].message.content


class City(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    million_people: Annotated[int, Field(ge=0, le=99)]


def test_a_schema(client):
    parsed = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe Paris."}],
        response_format=City,
        max_tokens=200,
        temperature=0,
    )
    assert isinstance(parsed.choices[0].message.parsed, City)


def test_responses(client):
    fields = {"model": MODEL, "instructions": "Be brief.", "input": "Name a fruit.", "temperature": 0}
    whole = client.responses.create(**fields, max_output_tokens=16)
    assert whole.output_text
    events = list(client.responses.create(**fields, max_output_tokens=16, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    called = client.responses.create(
        model=MODEL,
        input=QUESTION,
        tools=[{"type": "function", "strict": True} | WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=100,
    )
    (item,) = called.output
    assert (item.type, item.name) == ("function_call", "weather")


def test_errors(client, url):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(client, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="not served"):
        ask(client, model="other")
    with pytest.raises(openai.BadRequestError) as too_long:
        ask(client, messages=[{"role": "user", "content": "word " * 20_000}])
    assert too_long.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        ask(stranger)
