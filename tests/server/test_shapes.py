"""Answers have the shapes that OpenAI's clients read, whole and in chunks, and say what Orthrus itself says."""

import pytest

from orthrus.api import Orthrus
from orthrus.config import DecodeConfig, SamplingParams

from .conftest import chat, events, run, serving, text

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def own(orthrus: Orthrus, prompt_ids, **fields):
    """What Orthrus says without a server."""
    sampling = fields.pop("sampling", {})
    config = DecodeConfig(
        **{"max_new_tokens": 12, "ignore_eos": True, "strategy": "ar"} | fields,
        sampling=SamplingParams(**sampling),
    )
    return orthrus.stream_ids(prompt_ids, config).drain()


def test_a_whole_chat(orthrus):
    async def check():
        async with serving(orthrus) as client:
            answer = (await client.post(CHAT, json=chat())).json()
        (choice,) = answer["choices"]
        ids = orthrus.base.encode_prompt([{"role": "user", "content": "Hi"}])
        assert answer["object"] == "chat.completion"
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"] == own(orthrus, ids).text
        assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), 12)
        assert usage["total_tokens"] == len(ids) + 12

    run(check)


def test_a_chat_in_chunks(orthrus):
    async def check():
        async with serving(orthrus) as client:
            whole = (await client.post(CHAT, json=chat())).json()
            plain = events(await client.post(CHAT, json=chat(stream=True)))
            asked = events(
                await client.post(CHAT, json=chat(stream=True, stream_options={"include_usage": True}))
            )
        assert plain[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        said = "".join(e["choices"][0]["delta"].get("content", "") for e in plain)
        assert said == whole["choices"][0]["message"]["content"]
        assert [e["choices"][0]["finish_reason"] for e in plain[:-1]] == [None] * (len(plain) - 1)
        assert plain[-1]["choices"][0] == {
            "index": 0,
            "delta": {},
            "logprobs": None,
            "finish_reason": "length",
        }
        assert all(len(e["choices"]) == 1 and "usage" not in e for e in plain)
        assert "metrics" in plain[-1]
        assert len({e["id"] for e in plain}) == 1
        assert {e["object"] for e in plain} == {"chat.completion.chunk"}
        assert asked[-1]["choices"] == []
        assert asked[-1]["usage"] == whole["usage"]
        assert asked[-1]["metrics"].keys() == whole["metrics"].keys()
        assert all(e["usage"] is None for e in asked[:-1])

    run(check)


def test_a_completion_whole_and_in_chunks(orthrus):
    async def check():
        async with serving(orthrus) as client:
            whole = (await client.post(TEXT, json=text("Hello", logprobs=2))).json()
            pieces = events(await client.post(TEXT, json=text("Hello", logprobs=2, stream=True)))
            echoed = (await client.post(TEXT, json=text("Hello", echo=True))).json()
            echoes = events(await client.post(TEXT, json=text("Hello", echo=True, stream=True)))
        (choice,) = whole["choices"]
        result = own(orthrus, orthrus.base.encode_prompt("Hello", raw=True), logprobs=2)
        assert whole["object"] == "text_completion"
        assert choice["text"] == result.text
        lists = choice["logprobs"]
        mine = [lp for c in result.cycles for lp in c.logprobs]
        assert lists["token_logprobs"] == pytest.approx([lp.logprob for lp in mine], abs=1e-4)
        assert len(lists["tokens"]) == len(lists["top_logprobs"]) == len(lists["text_offset"]) == 12
        assert "".join(e["choices"][0]["text"] for e in pieces) == choice["text"]
        joined = [
            value
            for e in pieces
            if e["choices"][0]["logprobs"]
            for value in e["choices"][0]["logprobs"]["text_offset"]
        ]
        assert joined == lists["text_offset"]
        assert echoed["choices"][0]["text"] == "Hello" + choice["text"]
        assert "".join(e["choices"][0]["text"] for e in echoes) == "Hello" + choice["text"]

    run(check)


def test_log_probs_of_a_chat_hold_the_bytes_of_its_text(orthrus):
    async def check():
        body = chat(logprobs=True, top_logprobs=3, return_token_ids=True)
        async with serving(orthrus) as client:
            answer = (await client.post(CHAT, json=body)).json()
            pieces = events(await client.post(CHAT, json=body | {"stream": True}))
        (choice,) = answer["choices"]
        content = choice["logprobs"]["content"]
        spelt = bytes(byte for entry in content for byte in entry["bytes"])
        assert spelt.decode("utf-8", "replace") == choice["message"]["content"]
        assert [len(entry["top_logprobs"]) for entry in content] == [3] * 12
        ids = orthrus.base.encode_prompt([{"role": "user", "content": "Hi"}])
        result = own(orthrus, ids, logprobs=3)
        assert choice["token_ids"] == list(result.token_ids)
        assert answer["prompt_token_ids"] == ids
        mine = [lp.logprob for c in result.cycles for lp in c.logprobs]
        # Rows of another number of rows round otherwise with the eager runner.
        assert [e["logprob"] for e in content] == pytest.approx(mine, abs=1e-4)
        streamed = [
            entry
            for e in pieces
            for choice in e["choices"]
            if choice["logprobs"]
            for entry in choice["logprobs"]["content"]
        ]
        assert streamed == content
        assert [i for e in pieces for c in e["choices"] for i in c.get("token_ids", [])] == choice[
            "token_ids"
        ]

    run(check)


@pytest.mark.parametrize(
    ("fields", "settings", "sampling"),
    [
        (
            {"frequency_penalty": 1.5, "presence_penalty": -1.0},
            {},
            {"frequency_penalty": 1.5, "presence_penalty": -1.0},
        ),
        ({"repetition_penalty": 1.3}, {}, {"repetition_penalty": 1.3}),
        ({"logit_bias": {"70": 100}}, {}, {"logit_bias": {70: 100.0}}),
        (
            {"temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
            {},
            {"temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        ),
        ({"temperature": 1.0, "seed": 7, "top_k": -1}, {}, {"temperature": 1.0, "seed": 7}),
        ({"stop_token_ids": list(range(60, 90))}, {"stop_token_ids": tuple(range(60, 90))}, {}),
        (
            {"stop_token_ids": list(range(60, 90)), "min_tokens": 6},
            {"stop_token_ids": tuple(range(60, 90)), "min_tokens": 6},
            {},
        ),
        ({"stop": ["e", "A"]}, {"stop": ("e", "A")}, {}),
        ({"max_tokens": 3}, {"max_new_tokens": 3}, {}),
        ({"ignore_eos": False, "max_tokens": 40}, {"ignore_eos": False, "max_new_tokens": 40}, {}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_parameters_mean_what_they_mean_without_a_server(orthrus, fields, settings, sampling):
    async def check():
        async with serving(orthrus) as client:
            for strategy in ("ar", "fused_tree"):
                body = text("The same text", orthrus={"strategy": strategy}, return_token_ids=True) | fields
                answer = (await client.post(TEXT, json=body)).json()
                (choice,) = answer["choices"]
                assert choice["text"] == result.text
                assert choice["token_ids"] == list(result.token_ids)
                assert choice["finish_reason"] == result.finish_reason
                assert answer["usage"]["completion_tokens"] == len(result.token_ids)

    ids = orthrus.base.encode_prompt("The same text", raw=True)
    result = own(orthrus, ids, sampling=sampling, **settings)
    run(check)


def test_a_stop_string_is_never_shown_at_its_beginning(orthrus):
    ids = orthrus.base.encode_prompt("Hello", raw=True)
    told = own(orthrus, ids, max_new_tokens=40).text
    stop = told[10:14]

    async def check():
        async with serving(orthrus) as client:
            pieces = events(
                await client.post(TEXT, json=text("Hello", stop=stop, max_tokens=40, stream=True))
            )
        said = "".join(e["choices"][0]["text"] for e in pieces)
        assert said == told[: told.index(stop)]
        assert pieces[-1]["choices"][0]["finish_reason"] == "stop"

    run(check)


def test_several_texts_have_seeds_of_their_own_and_prompts_are_told_apart(orthrus):
    async def check():
        async with serving(orthrus) as client:
            one = text("Hello", temperature=1.0, seed=3)
            alone = (await client.post(TEXT, json=one)).json()
            three = (await client.post(TEXT, json=one | {"n": 3})).json()
            again = events(await client.post(TEXT, json=one | {"n": 3, "stream": True}))
            two = (await client.post(TEXT, json=one | {"n": 2, "prompt": ["Hello", "Other"]})).json()
            ids = [orthrus.base.encode_prompt(p, raw=True) for p in ("Hello", "Other")]
            by_ids = (await client.post(TEXT, json=one | {"n": 2, "prompt": ids})).json()
        texts = [c["text"] for c in three["choices"]]
        assert texts[0] == alone["choices"][0]["text"]
        assert len(set(texts)) == 3
        assert [c["index"] for c in three["choices"]] == [0, 1, 2]
        said = ["", "", ""]
        for e in again:
            said[e["choices"][0]["index"]] += e["choices"][0]["text"]
        assert said == texts
        assert sum(e["choices"][0]["finish_reason"] is not None for e in again) == 3
        assert [c["text"] for c in two["choices"]][:2] == texts[:2]
        assert [c["text"] for c in two["choices"]] == [c["text"] for c in by_ids["choices"]]
        assert two["usage"]["prompt_tokens"] == 10
        assert two["usage"]["completion_tokens"] == 48

    run(check)


def test_figures_of_an_answer(orthrus):
    async def check():
        async with serving(orthrus) as client:
            plain = (await client.post(TEXT, json=text("Hi", orthrus={"strategy": "ar"}))).json()
            drafted = (
                await client.post(TEXT, json=text("Hi", max_tokens=60, orthrus={"strategy": "tree"}))
            ).json()
        assert "speculative_decoding" not in plain["metrics"]
        assert plain["metrics"]["orthrus"]["strategy"] == "ar"
        assert plain["metrics"]["orthrus"]["passes"] == 12
        found = drafted["metrics"]["speculative_decoding"]
        histogram = found["acceptance_histogram"]
        assert sum(histogram) == found["num_spec_steps"] > 0
        assert sum(j * n for j, n in enumerate(histogram)) == found["num_accepted_draft_tokens"] > 0
        assert found["num_draft_tokens"] > found["num_accepted_draft_tokens"]
        rate = found["num_accepted_draft_tokens"] / found["num_draft_tokens"]
        assert found["draft_acceptance_rate"] == pytest.approx(rate, abs=1e-4)
        ours = drafted["metrics"]["orthrus"]
        assert ours["tokens_per_forward"] == pytest.approx(60 / ours["passes"], abs=1e-4)
        assert type(ours["seed"]) is int

    run(check)


def test_a_fresh_seed_is_told_and_gives_the_text_again(orthrus):
    async def check():
        async with serving(orthrus) as client:
            first = (await client.post(TEXT, json=text("Hi", temperature=1.0))).json()
            other = (await client.post(TEXT, json=text("Hi", temperature=1.0))).json()
            seed = first["metrics"]["orthrus"]["seed"]
            again = (await client.post(TEXT, json=text("Hi", temperature=1.0, seed=seed))).json()
        assert again["choices"] == first["choices"]
        assert other["metrics"]["orthrus"]["seed"] != seed
        assert seed < 2**53

    run(check)


def test_a_cached_prompt_is_counted(orthrus):
    async def check():
        async with serving(orthrus) as client:
            prompt = "a long beginning " * 9
            await client.post(TEXT, json=text(prompt))
            answer = (await client.post(TEXT, json=text(prompt))).json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == answer["metrics"]["orthrus"]["cached_tokens"] == 128

    run(check)


def test_json_answers_conform(orthrus):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    async def check():
        async with serving(orthrus) as client:
            said = []
            for strategy in ("ar", "tree"):
                body = chat(
                    response_format=wanted, ignore_eos=False, max_tokens=80, orthrus={"strategy": strategy}
                )
                answer = await client.post(CHAT, json=body)
                assert answer.status_code == 200, answer.text
                said.append(answer.json()["choices"][0]["message"]["content"])
            assert said[0] == said[1]
            assert said[0].startswith("{")
            body["orthrus"]["compact_json"] = True
            answer = await client.post(CHAT, json=body)
            assert answer.json()["choices"][0]["message"]["content"] in ('{"a":1}', '{"a":2}')

    run(check)


def test_streamed_completions_tell_the_ids_of_each_prompt(orthrus):
    async def check():
        body = text(["Hi", "Ho!"], return_token_ids=True)
        async with serving(orthrus) as client:
            whole = (await client.post(TEXT, json=body)).json()
            pieces = events(await client.post(TEXT, json=body | {"stream": True}))
        told = {
            choice["index"]: choice["prompt_token_ids"]
            for piece in pieces
            for choice in piece["choices"]
            if "prompt_token_ids" in choice
        }
        assert told == {choice["index"]: choice["prompt_token_ids"] for choice in whole["choices"]}

    run(check)
