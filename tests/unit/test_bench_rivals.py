"""The rivals' arms give one text, and the figures are those of the runs."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from tests.tiny_orthrus import tiny_orthrus

FOLDER = Path(__file__).parents[2] / "benchmarks" / "rivals"


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = spec_from_file_location("rivals", FOLDER / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_arm_gives_the_stock_models_text(rivals: Any) -> None:
    orthrus = tiny_orthrus()
    arms = {
        rivals.STOCK: rivals.stock(orthrus),
        "lookup": rivals.stock(orthrus, prompt_lookup_num_tokens=3),
        "ours": rivals.ours(orthrus, "fused_tree"),
    }
    ids = [orthrus.base.encode_prompt(text) for text in ("a prompt a prompt a prompt", "another")]
    runs = rivals.measure(arms, ids, 24, 2)
    results = {name: rivals.summary(mine, runs[rivals.STOCK]) for name, mine in runs.items()}
    assert all(r["num_equal"] == r["num_prompts"] == 2 for r in results.values())
    assert results[rivals.STOCK]["speedup"] == pytest.approx(1.0)
    assert results[rivals.STOCK]["tokens_per_pass"] == 1.0
    assert results["ours"]["tokens_per_pass"] > 1.0
    assert "| lookup |" in rivals.table(results)
    assert rivals.kept(runs["lookup"][0][0])["tokens"] == 24


def test_the_speed_up_is_a_ratio_of_whole_times(rivals: Any) -> None:
    answer = rivals.Answer
    base = [[answer((1, 2), 5.0, 40.0, 2)] * 2, [answer((1, 2), 5.0, 10.0, 2)] * 2]
    mine = [[answer((1, 2), 4.0, 20.0, 1)] * 2, [answer((1, 3), 4.0, 10.0, 1)] * 2]
    found = rivals.summary(mine, base)
    assert found["speedup"] == pytest.approx(2.0**0.5)
    assert found["interval"] == pytest.approx([1.0, 2.0])
    assert found["num_equal"] == 1
    assert found["tokens_per_second"] == pytest.approx(1e3 * 4 / 30)


class Server(httpx.BaseTransport):
    """llama.cpp's server, or one in OpenAI's form: it counts up from the last token of the prompt."""

    def __init__(self, *, is_llama: bool, has_ids: bool = True) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._is_llama, self._has_ids = is_llama, has_ids

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/props":
            return httpx.Response(200 if self._is_llama else 404, json={})
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        body = json.loads(request.content)
        self.bodies.append(body)
        assert path == ("/completion" if self._is_llama else "/v1/completions")
        number = body["n_predict" if self._is_llama else "max_tokens"]
        ids = [body["prompt"][-1] + 1 + i for i in range(number)]
        if not self._has_ids:
            return httpx.Response(400, json={"error": {"message": "unknown field"}})
        return httpx.Response(
            200, json={"tokens": ids} if self._is_llama else {"choices": [{"token_ids": ids}]}
        )


@pytest.mark.parametrize("is_llama", [True, False])
def test_a_server_is_an_arm(rivals: Any, is_llama: bool) -> None:
    transport = Server(is_llama=is_llama)
    name, arm = rivals.server("other=http://there:1", transport)
    answer = arm([5, 6], 3)
    assert (name, answer.token_ids, answer.ttft_ms, answer.num_passes) == ("other", (7, 8, 9), None, None)
    assert answer.total_ms > 0
    (body,) = transport.bodies
    assert (body["prompt"], body["temperature"], body["ignore_eos"]) == ([5, 6], 0, True)
    found = rivals.summary([[answer] * 2], [[answer] * 2])
    assert (found["ttft_ms"], found["num_equal"]) == (None, 1)
    assert "| – | 1 of 1 |" in rivals.table({name: found})
    assert rivals.kept(answer)["ttft_ms"] is None


def test_what_is_no_such_server_is_refused_in_a_sentence(rivals: Any) -> None:
    for wrong in ("vllm", "=http://x", "vllm=there:1"):
        with pytest.raises(typer.BadParameter, match="not of the form NAME=URL"):
            rivals.server(wrong)

    def absent(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    for transport in (
        httpx.MockTransport(absent),
        httpx.MockTransport(lambda _: httpx.Response(404, json={})),
    ):
        with pytest.raises(typer.BadParameter, match="http://x does not answer as a model's server"):
            rivals.server("vllm=http://x", transport)
    _, arm = rivals.server("old=http://x", Server(is_llama=False, has_ids=False))
    with pytest.raises(typer.BadParameter, match=r"old gave no token ids, but 400: .*unknown field"):
        arm([1], 2)
