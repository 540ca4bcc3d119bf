"""The repair head against loops over parents and children through the whole head."""

from math import inf, log

import pytest
import torch
from tests.engines import engine_for
from tests.tiny import tiny_dual, tiny_prompt

from orthrus.config import DecodeConfig, SamplingParams
from orthrus.decoding.noise import exponential_noise
from orthrus.decoding.pairs import FORESIGHT, pair_log_probs
from orthrus.decoding.sampling import filtered_probs
from orthrus.decoding.tree import Candidates
from orthrus.engine.choices import Guessed, rank
from orthrus.engine.request import Request
from orthrus.errors import CheckpointError
from orthrus.model.drafting import RepairTables
from orthrus.model.dual_view import DualView
from orthrus.model.repair import RepairHead
from orthrus.model.runner import EagerRunner
from orthrus.model.view_config import ViewConfig

FAMILIES = ["llama", "llama-tied", "gemma2", "gemma3", "phi3"]
RULES = SamplingParams(temperature=2.0, top_k=30, top_p=0.98, seed=3, repetition_penalty=1.3)
SETTINGS = {"greedy": SamplingParams(), "sampled": SamplingParams(temperature=1.3, seed=2), "rules": RULES}


def runner_of(dual: DualView, *, tables: bool = False) -> EagerRunner:
    runner = EagerRunner(dual)
    if tables:
        runner.repair_tables = RepairTables.of(dual)
    return runner


def request_of(dual: DualView, params: SamplingParams) -> Request:
    """One that has decided token 7 after the prompt."""
    config = DecodeConfig(strategy="chain", sampling=params)
    request = engine_for(dual).submit(tiny_prompt(4), config, eos_token_ids=frozenset())
    request.token_ids.append(7)
    request.rules.see([7])
    return request


def propose(
    runner: EagerRunner, params: SamplingParams, hidden_DC: torch.Tensor, first_position: int = 9
) -> Candidates:
    dual = runner.dual
    guessed = Guessed(request_of(dual, params), slice(0, len(hidden_DC)), first_position)
    logits_DV = runner.head(hidden_DC, drafts=True)
    return rank(runner, hidden_DC, logits_DV, [guessed])[0]


def head_of(dual: DualView, hidden_C: torch.Tensor, parent_id: int | None) -> torch.Tensor:
    """Logits of one row, with the sum that the head is written out."""
    if parent_id is not None:
        repair = dual.repair
        assert repair is not None
        embedding_C = dual.base.get_input_embeddings().weight[parent_id]

        def rms(x_C: torch.Tensor) -> torch.Tensor:
            return x_C / (x_C.square().mean() + torch.finfo(x_C.dtype).eps).sqrt()

        z = repair.hidden.weight @ rms(hidden_C) + repair.hidden.bias
        z = z + repair.parent.weight @ rms(embedding_C)
        hidden_C = hidden_C + repair.out.weight @ (z / (1 + (-z).exp()))
    return dual.head(hidden_C[None])[0]


def foreseen(probs_C: torch.Tensor) -> list[float]:
    """Where the guesses before them stand."""
    return [min(0.0, log(p) + FORESIGHT) if p else -inf for p in probs_C.tolist()]


def slow_proposal(
    dual: DualView, params: SamplingParams, hidden_DC: torch.Tensor, first_position: int = 9
) -> Candidates:
    """One parent and one child after the other; only the noise and the filters are the fast code's."""
    request = request_of(dual, params)
    temperature = 1.0 if params.greedy else params.temperature
    ids_DC, log_probs_DC, pairs_DPC = [], [], []
    for d, hidden_C in enumerate(hidden_DC):
        logits_V = head_of(dual, hidden_C, None)
        scores_V = request.rules(logits_V[None], [()])[0]
        if not params.greedy:
            noise_V = exponential_noise(request.seed, [first_position + d], len(logits_V), "cpu")[0]
            scores_V = (filtered_probs(scores_V[None], params)[0] / noise_V).log()
        scores = scores_V.double().exp()
        ids = scores.argsort(descending=True)[:16].tolist()
        given_PC = []
        for parent in ids_DC[-1] if d else [request.anchor_id]:
            change_V = head_of(dual, hidden_C, parent) - logits_V
            given = scores.clone()
            given[ids] *= (change_V[ids].double() / temperature).exp()
            given_PC.append(given[ids] / given.sum())
        ids_DC.append(ids)
        pairs_DPC.append([foreseen(given_C) for given_C in given_PC] if d else [])
        log_probs_DC.append(foreseen(scores[ids] / scores.sum()) if d else given_PC[0].log().tolist())
    return Candidates(ids_DC, log_probs_DC, pairs_DPC)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("with_tables", [False, True], ids=["computed", "tables"])
def test_a_proposal_is_that_of_a_loop_over_parents_and_children(
    name: str, params: SamplingParams, with_tables: bool
) -> None:
    dual = tiny_dual(name, disturb=0.3, repair_rank=6)
    runner = runner_of(dual, tables=with_tables)
    if with_tables:
        # Capped logits are no sums.
        assert (runner.repair_tables is None) == (name == "gemma2")
    hidden_DC = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        fast, slow = propose(runner, params, hidden_DC), slow_proposal(dual, params, hidden_DC)
        blind = propose(runner_of(tiny_dual(name, disturb=0.3)), params, hidden_DC)
    assert blind.pairs_DPC is None
    assert fast.pairs_DPC is not None
    assert slow.pairs_DPC is not None
    # Beyond what the filters leave any order will do; without a head fewer candidates are asked for.
    left = [sum(p > -inf for p in log_probs_C) for log_probs_C in slow.log_probs_DC]
    assert min(left) >= 5
    for d, num in enumerate(left):
        assert fast.token_ids_DC[d][:num] == slow.token_ids_DC[d][:num]
        assert fast.token_ids_DC[d][: min(num, 8)] == blind.token_ids_DC[d][: min(num, 8)]
        tables = [(fast.log_probs_DC[d], slow.log_probs_DC[d])]
        if d:
            tables += zip(fast.pairs_DPC[d][: left[d - 1]], slow.pairs_DPC[d], strict=False)
        for ours_C, expected_C in tables:
            ours, expected = (torch.tensor(log_probs_C[:num]) for log_probs_C in (ours_C, expected_C))
            torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)
    assert fast.log_probs_DC[0][:5] != pytest.approx(blind.log_probs_DC[0][:5], abs=1e-2)
    assert any(row != table[0] for table in fast.pairs_DPC[1:] for row in table), "parents make no difference"


def test_tables_in_bfloat16() -> None:
    dual = tiny_dual(disturb=0.3, repair_rank=6).to(torch.bfloat16)
    hidden_DC = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        computed = propose(runner_of(dual), SamplingParams(), hidden_DC)
        found = propose(runner_of(dual, tables=True), SamplingParams(), hidden_DC)
    assert found.token_ids_DC == computed.token_ids_DC
    for ours, theirs in zip(found.pairs_DPC or [], computed.pairs_DPC or [], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_head_without_rows_to_read_is_used_whole(name: str) -> None:
    """Such as a quantised one; the same proposal."""
    dual = tiny_dual(name, disturb=0.3, repair_rank=6)
    hidden_DC = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))

    class Opaque(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    with torch.inference_mode():
        expected = propose(runner_of(dual), SamplingParams(), hidden_DC)
        dual.base.set_output_embeddings(Opaque(dual.base.get_output_embeddings()))
        found = propose(runner_of(dual), SamplingParams(), hidden_DC)
    assert found.token_ids_DC == expected.token_ids_DC
    for ours, theirs in zip(found.pairs_DPC or [], expected.pairs_DPC or [], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS)
def test_an_untrained_head_changes_no_draft(params: SamplingParams) -> None:
    plain, headed = tiny_dual(disturb=0.3), tiny_dual(disturb=0.3)
    headed.add_repair(4)
    hidden_DC = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, theirs = (propose(runner_of(dual), params, hidden_DC, 3) for dual in (headed, plain))
    assert [ids[:8] for ids in ours.token_ids_DC] == theirs.token_ids_DC
    ours_DC = torch.tensor([log_probs[:8] for log_probs in ours.log_probs_DC])
    torch.testing.assert_close(ours_DC, torch.tensor(theirs.log_probs_DC))
    assert ours.pairs_DPC is not None
    for d in range(1, 5):
        for row in ours.pairs_DPC[d]:
            assert row[:8] == pytest.approx(theirs.log_probs_DC[d], abs=1e-5)


def test_pairs_are_finite_where_the_candidates_hold_all_the_mass() -> None:
    scores_DM = torch.tensor([[30.0, -60.0], [2.0, -torch.inf]])
    changes_DPM = torch.tensor([[[0.0, 0.0], [-95.0, 95.0]], [[0.0, 50.0], [-3.0, 0.0]]])
    log_probs_DPM = pair_log_probs(scores_DM, scores_DM.logsumexp(-1, keepdim=True), changes_DPM)
    expected = (scores_DM[:, None] + changes_DPM).log_softmax(-1)
    torch.testing.assert_close(log_probs_DPM, expected)


def test_what_is_no_candidate_keeps_its_score() -> None:
    scores_V = torch.randn(30, generator=torch.Generator().manual_seed(0))
    top = scores_V.topk(4)
    changes_PM = torch.tensor([[3.0, -2.0, 0.0, 1.0], [-9.0] * 4])
    found_PM = pair_log_probs(top.values[None], scores_V.logsumexp(-1)[None, None], changes_PM[None])[0]
    for change_M, row_M in zip(changes_PM, found_PM, strict=True):
        whole_V = scores_V.scatter_add(0, top.indices, change_M).log_softmax(-1)
        torch.testing.assert_close(row_M, whole_V[top.indices])


def test_the_seed_decides_what_an_untrained_head_starts_from() -> None:
    first, again, other = (RepairHead(16, 4, seed) for seed in (1, 1, 2))
    assert torch.equal(first.parent.weight, again.parent.weight)
    assert not torch.equal(first.parent.weight, other.parent.weight)
    assert not first.out.weight.any()


@pytest.mark.parametrize("rank", [0, -3, 2.5, True])
def test_a_head_of_no_rank_is_refused(rank: object) -> None:
    with pytest.raises(CheckpointError, match="repair_rank of a view must be a number"):
        ViewConfig(block_size=8, repair_rank=rank)  # type: ignore[arg-type]
