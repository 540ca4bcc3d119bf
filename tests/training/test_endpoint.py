"""Corpora answered by servers: the same answers as here, and what is left out or refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.server.conftest import END, NUM_IDS, byte_orthrus
from tests.training.endpoint_servers import Bridge, Scripted, refused, said, served, written
from tests.training.test_corpus import config, contents

from orthrus.api import Orthrus
from orthrus.config import SamplingParams
from orthrus.errors import ModelNotFoundError, UserInputError
from orthrus.training.answers import Answer, EngineAnswerer, Question
from orthrus.training.corpus import PROMPTS, left_out, read_corpus, read_jsonl, shard_path
from orthrus.training.endpoint import EndpointAnswerer, EndpointConfig
from orthrus.training.endpoint_guard import agreement
from orthrus.training.endpoint_http import Patience
from orthrus.training.manifest import MANIFEST
from orthrus.training.prompt_sources import PromptSource
from orthrus.training.synth import SynthConfig, SynthProgress, synthesise

URL = "http://one"
QUICK = Patience(attempts=3, first_rest=0.001, longest_rest=0.002)


@pytest.fixture(scope="module")
def orthrus() -> Orthrus:
    return byte_orthrus()


@pytest.fixture(scope="module")
def server(orthrus: Orthrus) -> Iterator[Bridge]:
    with served(byte_orthrus()) as bridge:
        yield bridge


def answerer(
    orthrus: Orthrus, transport: httpx.AsyncBaseTransport, *urls: str, key: str | None = None, **changes: Any
) -> EndpointAnswerer:
    settings = EndpointConfig(urls=urls or (URL,), **({"patience": QUICK} | changes))
    return EndpointAnswerer(settings, orthrus.base, key, transport)


def make(
    orthrus: Orthrus,
    transport: httpx.AsyncBaseTransport,
    folder: Path,
    settings: SynthConfig,
    on_progress: Any = None,
) -> Path:
    with answerer(orthrus, transport) as asked:
        synthesise(orthrus.base, asked, settings, folder, on_progress)
    return folder


def questions(orthrus: Orthrus, count: int = 3) -> list[Question]:
    texts = [f"Number {i}" for i in range(count)]
    return [Question(i, orthrus.base.encode_prompt(t), SamplingParams(), (t,)) for i, t in enumerate(texts)]


def answers(
    orthrus: Orthrus, script: Scripted, count: int = 3, *, max_new_tokens: int = 12, **changes: Any
) -> list[Answer]:
    with answerer(orthrus, script, **changes) as asked:
        return sorted(asked(questions(orthrus, count), max_new_tokens=max_new_tokens))


def test_our_own_server_makes_the_very_corpus_that_is_made_here(
    orthrus: Orthrus, server: Bridge, tmp_path: Path
) -> None:
    settings = config(tmp_path)
    here = EngineAnswerer(orthrus.engine, 3, orthrus.base.eos_token_ids)
    synthesise(orthrus.base, here, settings, tmp_path / "here")
    folder = make(orthrus, server, tmp_path / "there", settings)
    assert contents(folder) == contents(tmp_path / "here")
    assert {body["temperature"] for body in server.bodies()} == {0.0, 0.8}
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["settings"]["answerer"] == "endpoint"
    (about,) = manifest["servers"]
    assert about["url"] == "http://one/v1"
    assert about["model"] == "tiny"
    assert about["guard"]["agreeing"] == 1.0
    assert about["guard"]["answers"] == 10
    assert "token ids where it gives them" in about["form"]


def test_a_stopped_corpus_goes_on_and_equals_an_unbroken_one(
    orthrus: Orthrus, server: Bridge, tmp_path: Path
) -> None:
    whole = contents(make(orthrus, server, tmp_path / "whole", config(tmp_path)))

    def interrupt(progress: SynthProgress) -> None:
        if progress.stage == "answers" and progress.done == 6:
            raise KeyboardInterrupt

    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        make(orthrus, server, parts, config(tmp_path), interrupt)
    assert shard_path(parts, 0).is_file()
    assert not shard_path(parts, 1).is_file()
    before = len(server.bodies())
    assert contents(make(orthrus, server, parts, config(tmp_path))) == whole
    # A probe, the greedy ones of the guard, and what was missing.
    assert len(server.bodies()) - before == 1 + 10 + 6
    manifest = json.loads((parts / MANIFEST).read_text())
    assert len(manifest["servers"]) == 1


def test_a_finished_corpus_asks_nobody(orthrus: Orthrus, server: Bridge, tmp_path: Path) -> None:
    folder = make(orthrus, server, tmp_path / "corpus", config(tmp_path))
    make(orthrus, Scripted(lambda _: refused(500)), folder, config(tmp_path))


def test_answers_from_here_and_from_a_server_are_not_mixed(
    orthrus: Orthrus, server: Bridge, tmp_path: Path
) -> None:
    folder = make(orthrus, server, tmp_path / "corpus", config(tmp_path))
    here = EngineAnswerer(orthrus.engine, 3, orthrus.base.eos_token_ids)
    with pytest.raises(UserInputError, match=r"begun with other settings \(answerer"):
        synthesise(orthrus.base, here, config(tmp_path), folder)


def disturbed() -> Orthrus:
    """Another model."""
    other = byte_orthrus()
    with torch.no_grad():
        for parameter in other.base.model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.5)
    return other


def test_another_model_is_refused_before_it_answers(orthrus: Orthrus, tmp_path: Path) -> None:
    with (
        served(disturbed()) as bridge,
        pytest.raises(UserInputError, match="serves another model than tiny: only"),
    ):
        make(orthrus, bridge, tmp_path / "corpus", config(tmp_path))
    assert not list((tmp_path / "corpus").glob("answers-*"))
    # The prompts stay, and the right server goes on.
    assert (tmp_path / "corpus" / PROMPTS).is_file()


def test_prompts_of_another_model_are_made_anew(
    orthrus: Orthrus, server: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def made(*_: Any, **__: Any) -> Iterator[tuple[str, str]]:
        asked.append(1)
        return ((f"prompt {i} of attempt {len(asked)}", "chat") for i in range(12))

    monkeypatch.setattr("orthrus.training.prompt_sources.self_prompts", made)
    own = replace(config(tmp_path), sources=(PromptSource(domain="chat", count=12),))
    with served(disturbed()) as bridge, pytest.raises(UserInputError, match="serves another model"):
        make(orthrus, bridge, tmp_path / "corpus", own)
    assert not (tmp_path / "corpus" / PROMPTS).exists()
    make(orthrus, server, tmp_path / "corpus", own)
    prompts = [record["prompt"] for record in read_jsonl(tmp_path / "corpus" / PROMPTS)]
    assert sorted(prompts) == sorted(f"prompt {i} of attempt 2" for i in range(12))


def test_agreement_counts_what_the_base_would_have_chosen(orthrus: Orthrus) -> None:
    here = EngineAnswerer(orthrus.engine, 8, orthrus.base.eos_token_ids)
    asked = questions(orthrus, 4)
    own = {a.key: a.token_ids for a in here(asked, max_new_tokens=16)}
    pairs = [(q.prompt_ids, own[q.key]) for q in asked]
    found = agreement(orthrus.base.model, pairs)
    assert found.share == 1.0
    assert found.tokens == sum(map(len, own.values()))
    random = [(p, [(i * 7) % NUM_IDS for i in ids]) for p, ids in pairs]
    against = agreement(orthrus.base.model, random)
    assert against.share < 0.5
    assert against.mean_log_prob < found.mean_log_prob
    # One wrong token costs itself, and nothing that follows is judged by another text than it stands in.
    prompt, ids = pairs[0]
    assert agreement(orthrus.base.model, [(prompt, ids[:3])]).tokens == 3


def test_texts_are_read_as_tokens_or_left_out(orthrus: Orthrus) -> None:
    replies = iter([written("probe"), written("plain"), written("cut", "length"), written("</s>odd")])
    one, two, three = answers(orthrus, Scripted(lambda _: next(replies)), concurrency=1)
    encode = orthrus.base.tokenizer
    assert one.token_ids == [*encode("plain")["input_ids"], END]
    assert one.finished
    assert two.token_ids == encode("cut")["input_ids"]
    assert not two.finished
    assert three.token_ids == []
    assert three.left_out == "a text that does not come back from its tokens"


def test_ids_end_with_the_end_of_text(orthrus: Orthrus) -> None:
    replies = iter(
        [
            written("probe"),
            written(token_ids=[5, 6, END]),
            written(token_ids=[5, 6]),
            written(token_ids=[5, END, 9]),
            written(token_ids=[NUM_IDS]),
            written(token_ids=list(range(5, 30)), finish="length"),
            written(token_ids=[], finish="length"),
            written(token_ids=[5], finish="content_filter"),
        ]
    )
    found = answers(orthrus, Scripted(lambda _: next(replies)), 7, concurrency=1)
    assert [a.token_ids for a in found] == [
        [5, 6, END],
        [5, 6, END],
        [5, END],
        [],
        list(range(5, 17)),
        [],
        [],
    ]
    assert [a.finished for a in found] == [True, True, True, False, False, False, False]
    assert [bool(a.left_out) for a in found] == [False, False, False, True, False, True, True]


def test_what_was_left_out_is_counted_and_stays_out(orthrus: Orthrus, server: Bridge, tmp_path: Path) -> None:
    class Broken(httpx.AsyncBaseTransport):
        """Our server, but sampled answers come back as texts that no tokens give."""

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.method == "POST" and json.loads(request.content)["temperature"]:
                return written("odd </s> odd")
            return await server.handle_async_request(request)

    folder = make(orthrus, Broken(), tmp_path / "corpus", config(tmp_path))
    (number,) = left_out(folder).values()
    assert 0 < number < 10
    assert len(list(read_corpus(folder))) == 10 - number


def test_servers_that_take_no_ids_are_asked_in_messages(orthrus: Orthrus) -> None:
    def script(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/v1/completions":
            return refused(400, "prompt must be a text")
        if "return_token_ids" in body:
            return refused(400, "unknown field")
        return said("fine") if body["messages"][0]["content"] != "Number 2" else said("", reasoning="hm")

    scripted = Scripted(script)
    one, two, three = answers(orthrus, scripted)
    assert one.token_ids == two.token_ids == [*orthrus.base.tokenizer("fine")["input_ids"], END]
    assert three.left_out == "reasoning or calls beside the text"
    body = json.loads(scripted.asked[-1].content)
    assert body["messages"] == [{"role": "user", "content": "Number 2"}]
    assert body["model"] == "served"
    assert "top_k" not in body


def test_ids_that_a_server_reads_as_something_else_are_not_sent_again(orthrus: Orthrus) -> None:
    def script(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/completions":
            counted = {"choices": [{"text": "x", "finish_reason": "length"}], "usage": {"prompt_tokens": 99}}
            return httpx.Response(200, json=counted)
        return said("fine")

    scripted = Scripted(script)
    assert all(a.token_ids for a in answers(orthrus, scripted))
    assert sum(r.url.path == "/v1/completions" for r in scripted.asked) == 2


def test_a_chat_server_makes_no_prompts(orthrus: Orthrus) -> None:
    scripted = Scripted(lambda r: refused(404) if r.url.path == "/v1/completions" else said("fine"))
    with answerer(orthrus, scripted) as asked, pytest.raises(ModelNotFoundError, match="refuses requests"):
        list(asked([Question(0, [5, 6], SamplingParams())], max_new_tokens=4))
    with answerer(orthrus, scripted) as asked:
        assert list(asked(questions(orthrus, 1), max_new_tokens=4))
        with pytest.raises(UserInputError, match="no turns of the user"):
            list(asked([Question(0, [5, 6], SamplingParams())], max_new_tokens=4))


@pytest.mark.parametrize(
    ("urls", "words"),
    [
        (("one:8000",), "give an address such as"),
        (("ftp://one",), "give an address such as"),
        (("http://",), "give an address such as"),
        (("http://one:99999",), "give an address such as"),
        (("http://me:secret@one",), "ORTHRUS_API_KEY"),
        (("http://one/v1?key=secret",), "ORTHRUS_API_KEY"),
        ((), "no endpoint"),
    ],
)
def test_addresses(urls: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserInputError, match=words):
        EndpointConfig(urls=urls)


def test_an_address_may_end_as_it_likes() -> None:
    config_ = EndpointConfig(urls=("http://one:8000", "http://one:8000/v1/", "https://two/api/v1"))
    assert config_.urls == ("http://one:8000/v1", "https://two/api/v1")


def test_the_key_is_sent_and_written_nowhere(orthrus: Orthrus, server: Bridge, tmp_path: Path) -> None:
    with answerer(orthrus, server, key="sk-secret") as asked:
        synthesise(orthrus.base, asked, config(tmp_path), tmp_path / "corpus")
    assert server.requests[-1].headers["authorization"] == "Bearer sk-secret"
    assert not any("sk-secret" in file.read_text() for file in (tmp_path / "corpus").iterdir())
    scripted = Scripted(lambda _: refused(401, "no such key: sk-secret"))
    with (
        answerer(orthrus, scripted, key="sk-secret") as asked,
        pytest.raises(ModelNotFoundError, match="check the key") as caught,
    ):
        asked.check(questions(orthrus), max_new_tokens=8)
    assert "sk-secret" not in str(caught.value)
    with answerer(orthrus, scripted) as asked, pytest.raises(ModelNotFoundError, match="set ORTHRUS_API_KEY"):
        asked.check(questions(orthrus), max_new_tokens=8)


def test_a_record_of_what_was_left_out_reads_back(orthrus: Orthrus, server: Bridge, tmp_path: Path) -> None:
    folder = make(orthrus, server, tmp_path / "corpus", config(tmp_path))
    assert left_out(folder) == {}
    assert all("left_out" not in r for file in folder.glob("answers-*") for r in read_jsonl(file))
