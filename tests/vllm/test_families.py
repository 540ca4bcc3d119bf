"""Each family on a tiny random model: our own engine's tokens, and its drafts. One engine start each."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from orthrus.integrations.vllm.names import command_line, engine_arguments

pytestmark = pytest.mark.families
NAMES = ("llama", "llama-rank-4-of-one-layer", "qwen2", "qwen3", "qwen3-released", "mistral")
OPTIONS = {"enforce_eager": True, "max_model_len": 256, "block_size": 32, "max_num_seqs": 4}


def drafted(run: Any, model: Path, oracle: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What vLLM makes of the oracle's prompts: always seven drafts a cycle."""
    sampling = {
        "temperature": 0.0,
        "max_tokens": oracle["new_tokens"],
        "ignore_eos": True,
        "detokenize": False,
    }
    rounds = [{"prompts": oracle["prompts"], "sampling": sampling}]
    found: dict[str, Any] = run(model, rounds, **OPTIONS, **options, **engine_arguments(7, adaptive=False))
    return found["rounds"][0]  # type: ignore[no-any-return]


def assert_like_our_engine(found: dict[str, Any], oracle: dict[str, Any]) -> None:
    """The same tokens, from about as many drafts and accepted drafts."""
    assert [ids for (ids,) in found["token_ids"]] == oracle["token_ids"]
    drafts = found["counters"]["vllm:spec_decode_num_drafts"]
    by_position = found["counters"]["vllm:spec_decode_num_accepted_tokens_per_pos"]
    assert drafts == pytest.approx(oracle["num_drafts"], rel=0.1)
    # The first is the AR view's own, by the floor.
    assert by_position[0] > 0.95 * drafts
    assert by_position[1:] == pytest.approx(oracle["accepted_by_position"], abs=2)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_acceptance_are_our_own_engines(name: str, families: Path, run: Any) -> None:
    oracle = json.loads((families / "families.json").read_text())[name]
    assert_like_our_engine(drafted(run, families / name / "vllm", oracle), oracle)


@pytest.mark.parametrize("name", ["llama", "qwen3-released"])
def test_two_processes_share_a_model(name: str, families: Path, run: Any) -> None:
    """Tensor parallel: each process has half of the heads of both views."""
    oracle = json.loads((families / "families.json").read_text())[name]
    found = drafted(run, families / name / "vllm", oracle, tensor_parallel_size=2)
    assert_like_our_engine(found, oracle)


def test_two_engines_share_a_server(families: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data parallel: vLLM offers it in a server, and both engines get requests."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from vllm_throughput import Server, ask_all

    oracle = json.loads((families / "families.json").read_text())["qwen3"]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--block-size", "32"]
    options += ["--data-parallel-size", "2", *command_line(7, adaptive=False)]
    server = Server(families / "qwen3" / "vllm", tmp_path / "server.log", *options)
    try:
        server.wait()
        token_ids = asyncio.run(ask_all(server, oracle["prompts"], 4, oracle["new_tokens"]))[1]
        requests = [server.counter("request_success", f'engine="{engine}"') for engine in range(2)]
        accepted = "spec_decode_num_accepted_tokens_per_pos"
        counters = {
            "vllm:spec_decode_num_drafts": server.counter("spec_decode_num_drafts"),
            f"vllm:{accepted}": [server.counter(accepted, f'position="{i}"') for i in range(7)],
        }
    finally:
        server.leave()
    assert min(requests) > 0
    assert sum(requests) == len(oracle["prompts"])
    assert_like_our_engine({"token_ids": [[ids] for ids in token_ids], "counters": counters}, oracle)
