"""The default model in three engines: plain vLLM, and ours with a cache too small and with one that is kept."""

from pathlib import Path
from typing import Any

import pytest

from orthrus.integrations.vllm.names import engine_arguments

NUM_DRAFTS = 7
SPEC = "vllm:spec_decode_num_"
# Blocks of 32 slots; prompts longer than 64 tokens come in chunks.
COMMON = {
    "enforce_eager": True,
    "max_model_len": 320,
    "block_size": 32,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
}


def greedy(oracle: dict[str, Any]) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_tokens": oracle["new_tokens"], "ignore_eos": True}
    return {"prompts": oracle["prompts"], "sampling": sampling}


@pytest.fixture(scope="module")
def plain(run: Any, folder: Path, oracle: dict[str, Any]) -> dict[str, Any]:
    """Of the stock folder, by vLLM's own worker and scheduler."""
    found: dict[str, Any] = run(folder / "stock", [greedy(oracle)], **COMMON)
    return found["rounds"][0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def starved(run: Any, folder: Path, oracle: dict[str, Any]) -> dict[str, Any]:
    """640 slots for eight requests at once, and nothing kept between them."""
    options = COMMON | {"enable_prefix_caching": False, "num_gpu_blocks_override": 20}
    drafting = engine_arguments(NUM_DRAFTS, adaptive=False)
    found: dict[str, Any] = run(folder / "orthrus", [greedy(oracle)], **options, **drafting)
    return found["rounds"][0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def kept(run: Any, folder: Path, oracle: dict[str, Any]) -> list[dict[str, Any]]:
    """Room for all, and the same requests twice: the second time their prompts are in the cache."""
    drafting = engine_arguments(NUM_DRAFTS, adaptive=False)
    options = COMMON | {"enable_prefix_caching": True}
    found: dict[str, Any] = run(folder / "orthrus", [greedy(oracle)] * 2, **options, **drafting)
    return found["rounds"]  # type: ignore[no-any-return]


def test_our_own_engine_writes_what_plain_vllm_writes(plain: dict[str, Any], oracle: dict[str, Any]) -> None:
    assert texts(plain) == oracle["token_ids"]


def test_requests_that_were_preempted_write_what_plain_vllm_writes(
    starved: dict[str, Any], plain: dict[str, Any]
) -> None:
    assert starved["counters"]["vllm:num_preemptions"] > 0
    assert starved["counters"][f"{SPEC}accepted_tokens"] > 0
    assert texts(starved) == texts(plain)


def test_requests_whose_prompts_are_cached_write_what_plain_vllm_writes(
    kept: list[dict[str, Any]], plain: dict[str, Any]
) -> None:
    assert kept[1]["counters"]["vllm:prefix_cache_hits"] > 0
    assert [texts(one) for one in kept] == [texts(plain)] * 2


def test_cycles_are_as_long_as_our_own_engines(kept: list[dict[str, Any]], oracle: dict[str, Any]) -> None:
    ours = sum(len(ids) - 1 for ids in oracle["token_ids"]) / oracle["cycles"]
    for one in kept:
        # vLLM has no cycle for a request's last token where nothing may be drafted: count what it verified.
        drafts = one["counters"][f"{SPEC}drafts"]
        found = 1 + one["counters"][f"{SPEC}accepted_tokens"] / drafts
        assert found == pytest.approx(ours, rel=0.05)


def test_acceptance_by_position_is_our_own_engines(
    kept: list[dict[str, Any]], oracle: dict[str, Any]
) -> None:
    """With the floor vLLM's first draft is the AR view's own token; the others are the block's."""
    ours = [count / oracle["num_drafts"] for count in oracle["accepted_by_position"]]
    for one in kept:
        drafts = one["counters"][f"{SPEC}drafts"]
        found = [n / drafts for n in one["counters"][f"{SPEC}accepted_tokens_per_pos"]]
        assert found[0] > 0.98
        assert found[1:] == pytest.approx(ours, abs=0.03)


def test_a_prefix_hit_costs_no_acceptance(kept: list[dict[str, Any]]) -> None:
    first, second = (one["counters"][f"{SPEC}accepted_tokens_per_pos"] for one in kept)
    assert second == pytest.approx(first, abs=4)


def texts(one: dict[str, Any]) -> list[list[int]]:
    return [texts_of_request[0] for texts_of_request in one["token_ids"]]
