"""The parts of the vLLM integration that need no vLLM: rows of a draft pass, chains, settings, versions."""

import numpy as np
import pytest
import torch
from tests.tiny import tiny_dual
from torch import Tensor

from orthrus.errors import CheckpointError, UnsupportedModelError, UserInputError
from orthrus.integrations.vllm.chain import walk
from orthrus.integrations.vllm.draft_batch import DraftBatch, Drafting, draft_batch, most_drafts
from orthrus.integrations.vllm.names import MODELS, architecture_of, command_line, engine_arguments
from orthrus.integrations.vllm.settings import Settings, view_config
from orthrus.integrations.vllm.versions import refusal
from orthrus.model.drafting import repaired

PAGE = 4


def batch_of_two(floor: bool) -> DraftBatch:
    """Places 2 and 0 of vLLM's batch, with 6 and 3 known tokens, drafting 3 and 1."""
    table = np.array([[7, 8, 0], [1, 2, 3], [4, 5, 6]], dtype=np.int32)
    requests = [Drafting(2, 50, 6, 3), Drafting(0, 60, 3, 1)]
    return draft_batch(requests, table, PAGE, floor=floor, mask_id=9)


def test_a_block_is_the_anchor_and_a_mask_for_each_draft() -> None:
    batch = batch_of_two(floor=False)
    assert batch.token_ids_R.tolist() == [50, 9, 9, 9, 60, 9]
    assert batch.is_mask_R.tolist() == [False, True, True, True, False, True]
    # The anchor is the last known token: known tokens less one stand before it.
    assert batch.positions_R.tolist() == [5, 6, 7, 8, 2, 3]
    assert batch.starts_N1.tolist() == [0, 4, 6]


def test_rows_write_the_slots_of_their_positions_in_their_own_requests_pages() -> None:
    # Page 5 holds positions 4 to 7 of the request at place 2, page 6 those after; page 7 the other's first four.
    assert batch_of_two(floor=False).slots_R.tolist() == [21, 22, 23, 24, 30, 31]


def test_without_a_floor_all_rows_but_the_last_guess() -> None:
    batch = batch_of_two(floor=False)
    assert batch.guess_rows_D.tolist() == [0, 1, 2, 4]
    assert batch.num_guesses == (3, 1)
    assert batch.num_ar_rows == 0


def test_with_a_floor_the_anchors_come_first_and_decide_the_first_draft() -> None:
    batch = batch_of_two(floor=True)
    assert batch.num_ar_rows == 2
    assert batch.token_ids_R.tolist()[:2] == [50, 60]
    assert batch.slots_R.tolist()[:2] == [21, 30]
    assert not batch.is_mask_R[:2].any()
    assert batch.guess_rows_D.tolist() == [1, 2]
    assert batch.num_guesses == (2, 0)


@pytest.mark.parametrize(
    ("known", "wanted", "room", "most"),
    [(10, 7, 100, 7), (10, 9, 100, 7), (95, 7, 100, 5), (100, 7, 100, 0), (10, 7, 3, 2), (10, 7, 1, 0)],
)
def test_a_request_drafts_no_more_than_view_context_and_answer_allow(
    known: int, wanted: int, room: int, most: int
) -> None:
    assert most_drafts(known, wanted, block_size=8, max_length=100, room=room) == most


def test_without_a_repair_head_each_row_gives_its_best() -> None:
    logits_DV = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    best = logits_DV.argmax(-1).tolist()
    chains = walk(logits_DV, logits_DV, (2, 0, 3), torch.zeros(3, dtype=torch.long))
    assert chains == [best[:2], [], best[2:]]


def test_a_repair_head_lets_each_guess_know_the_one_before_it() -> None:
    """Against the head run over the whole vocabulary, one request and one row at a time."""
    dual = tiny_dual("llama", disturb=0.3)
    dual.add_repair(4)
    assert dual.repair is not None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        dual.repair.out.weight.copy_(torch.randn(dual.repair.out.weight.shape, generator=generator))
    head_VC = dual.base.get_output_embeddings().weight
    hidden_DC = torch.randn(5, head_VC.shape[1], generator=generator)

    def change(hidden_NC: Tensor, parents_N: Tensor, children_NM: Tensor) -> Tensor:
        moved_NC = repaired(dual, hidden_NC, parents_N) - hidden_NC
        return (moved_NC[:, None] * head_VC[children_NM]).sum(-1)

    with torch.inference_mode():
        logits_DV = dual.head(hidden_DC)
        found = walk(hidden_DC, logits_DV, (3, 2), torch.tensor([5, 6]), change)
        plain = walk(hidden_DC, logits_DV, (3, 2), torch.tensor([5, 6]))
        row = 0
        for parent, chain in ((5, found[0]), (6, found[1])):
            for token in chain:
                best = dual.head(repaired(dual, hidden_DC[row], torch.tensor(parent)))
                among = logits_DV[row].topk(16).indices
                assert token == among[best[among].argmax()]
                parent, row = token, row + 1
    assert found != plain


def test_settings_reach_the_workers_through_the_additional_config() -> None:
    arguments = engine_arguments(5, floor=False, adaptive=True)
    assert Settings.of(arguments["additional_config"]) == Settings(floor=False, adaptive=True)
    assert Settings.of(None) == Settings.of({"somebody": "else"}) == Settings()
    assert arguments["speculative_config"]["num_speculative_tokens"] == 5


@pytest.mark.parametrize("wrong", [{"floors": True}, {"floor": 1}, ["floor"]])
def test_wrong_settings_are_refused_by_name(wrong: object) -> None:
    with pytest.raises(UserInputError, match="floor"):
        Settings.of({"orthrus": wrong})


def test_the_command_line_says_the_same() -> None:
    words = command_line(7, "cuda")
    assert words[0] == "--speculative-config"
    assert '"num_speculative_tokens": 7' in words[1]
    assert words[words.index("--worker-cls") + 1].endswith("gpu.OrthrusGPUWorker")


class Config:
    """A config.json as vLLM sees it."""

    def __init__(self, **values: object) -> None:
        self.__dict__ |= values


def test_the_released_layout_says_what_its_view_is() -> None:
    found = view_config(Config(block_size=8, mask_token_id=3))
    assert (found.block_size, found.mask_token_id, found.trained) == (8, 3, True)


def test_a_folder_that_was_not_exported_is_refused() -> None:
    for config in (Config(), Config(orthrus={"format_version": 1, "block_size": 8, "rank": 4})):
        with pytest.raises(CheckpointError, match="orthrus export vllm"):
            view_config(config)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.0.post1"])
def test_builds_of_the_known_release_are_taken(version: str) -> None:
    assert refusal(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.32.1", "1.0"])
def test_another_release_is_refused_in_a_sentence(version: str) -> None:
    problem = refusal(version)
    assert problem is not None
    assert version in problem
    assert "0.32.0" in problem
    assert "orthrus serve" in problem


def test_each_family_has_a_class_and_others_are_refused() -> None:
    assert {architecture_of(name) for name in ("Llama", "Qwen2", "Qwen3", "Mistral")} < set(MODELS)
    with pytest.raises(UnsupportedModelError, match="Gemma2"):
        architecture_of("Gemma2")
