"""LangChain, LiteLLM and lm-evaluation-harness against the server."""

import json

import pytest

from conftest import KEY, MODEL, QUESTION, WEATHER

COLOURS = "Name three colours."


def test_langchain(url):
    chat_models = pytest.importorskip("langchain_openai")
    model = chat_models.ChatOpenAI(
        base_url=f"{url}/v1", api_key=KEY, model=MODEL, temperature=0, max_tokens=40, max_retries=0
    )
    whole = model.invoke(COLOURS)
    assert "".join(chunk.text for chunk in model.stream(COLOURS)) == whole.text != ""
    tool = {"type": "function", "function": WEATHER}
    calls = model.bind_tools([tool], tool_choice="required", parallel_tool_calls=False).invoke(QUESTION)
    assert calls.tool_calls[0]["name"] == "weather"
    schema = {"title": "city", "type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}}
    schema |= {"required": ["name"], "additionalProperties": False}
    assert model.with_structured_output(schema, method="json_schema").invoke("Name a city.").keys() == {
        "name"
    }


def test_litellm(url):
    litellm = pytest.importorskip("litellm")
    fields = {"messages": [{"role": "user", "content": COLOURS}], "temperature": 0, "max_tokens": 20}
    openai = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": KEY} | fields
    whole = litellm.completion(**openai).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**openai, stream=True)]
    assert "".join(pieces) == whole != ""
    anthropic = {"model": f"anthropic/{MODEL}", "api_base": url, "api_key": KEY} | fields
    assert litellm.completion(**anthropic).choices[0].message.content == whole


def test_lm_eval(url, tmp_path, monkeypatch):
    # It takes many minutes to install, so it is not among the requirements.
    lm_eval = pytest.importorskip(
        "lm_eval", reason="run .venv-clients/bin/pip install 'lm_eval[api]' to test it"
    )
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    questions = [{"question": f"{a}, {a + 1}, {a + 2},", "answer": f" {a + 3}"} for a in range(1, 5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    task = {
        "task": "counting",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [","], "max_gen_toks": 8, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    arguments = {
        "base_url": f"{url}/v1/completions",
        "model": MODEL,
        "tokenizer_backend": None,
        "tokenized_requests": False,
        "num_concurrent": 2,
    }
    told = lm_eval.simple_evaluate(model="local-completions", model_args=arguments, tasks=[task])
    # A model of this size counts to seven.
    assert told["results"]["counting"]["exact_match,none"] >= 0.5
