"""Differences of texts with penalties, filters and rules: judged by what really decided them."""

import pytest
import torch
from tests.tiny import VOCAB
from tests.tiny_orthrus import tiny_orthrus

from orthrus.api import decode_config
from orthrus.audit.explain import first_difference, judge
from orthrus.audit.place import Place, scores
from orthrus.audit.plain import Answered, PlainReplay
from orthrus.audit.replay import replay_ours
from orthrus.audit.shapes import AS_DECODED, ONE_ROW

PROMPT, NEW = [5, 6, 7, 5], [9, 9, 11]


def place(**decode):
    options = {"max_new_tokens": 30, "seed": 3} | decode
    return Place(tiny_orthrus(), PROMPT, NEW, decode_config(**options))


def test_scores_follow_penalties_bias_and_ends_that_come_too_early():
    logits_V = torch.linspace(1.0, 2.0, VOCAB)
    found = place(
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias={20: 3.0},
        min_tokens=10,
    ).scores(logits_V)
    expected = logits_V.clone()
    expected[20] += 3.0
    expected[[5, 6, 7, 9, 11]] /= 2.0
    expected[9] -= 2 * 0.5 + 0.25
    expected[11] -= 0.5 + 0.25
    expected[2] = -torch.inf
    torch.testing.assert_close(found, expected)


def test_scores_of_a_plain_request_are_its_logits():
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    here = place()
    assert not here.has_filters
    assert torch.equal(here.scores(logits_V), logits_V)
    sampled = place(temperature=0.7)
    assert not sampled.has_filters
    torch.testing.assert_close(
        sampled.scores(logits_V), scores(logits_V, sampled.sampling, len(PROMPT) + len(NEW))
    )


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.5}])
def test_filters_take_out_what_scores_might_choose(filters):
    here = place(temperature=1.0, **filters)
    logits_V = torch.full((VOCAB,), -4.0)
    logits_V[[10, 11]] = torch.tensor([3.0, 2.9])
    found = here.scores(logits_V, filtered=True)
    assert here.has_filters
    assert found.isfinite().nonzero()[:, 0].tolist() == [10, 11]
    assert here.scores(logits_V).isfinite().all()


@pytest.mark.parametrize(
    ("filters", "inside", "outside"),
    [({"top_k": 2}, 1.5, 0.5), ({"min_p": 0.5}, 1.0 - 0.5, 1.0 - 0.9), ({"top_p": 0.7}, 0.9, -2.0)],
)
def test_a_token_at_the_edge_of_a_filter_may_go_either_way(filters, inside, outside, monkeypatch):
    log_noise_V = torch.zeros(VOCAB)
    # Token 12 has the luck: were it kept, it would win.
    log_noise_V[12] = -8.0
    monkeypatch.setattr("orthrus.audit.place._log_noise", lambda sampling, position, like_V: log_noise_V)
    here = place(temperature=1.0, **filters)

    def verdict(third, noise):
        logits_V = torch.full((VOCAB,), -20.0)
        logits_V[[10, 11, 12]] = torch.tensor([1.0, 1.01, third])
        shape_V, other_V = here.scores(logits_V), here.scores(logits_V)
        other_V[11] += noise
        shapes = {ONE_ROW: shape_V, AS_DECODED: other_V}
        return judge(shapes, None, 12, 11, here.could_take).verdict

    # Safely inside, the baseline would have taken token 12, so ours is wrong; at the edge nobody knows.
    assert verdict(inside, 0.01) == "broken rule"
    assert verdict(inside, 0.6) == "near-tie"
    # Safely outside, it cannot win: ours is the best of those that are kept.
    assert verdict(outside, 0.0) == "near-tie"


def test_a_token_that_no_filter_keeps_is_broken(monkeypatch):
    monkeypatch.setattr(
        "orthrus.audit.place._log_noise", lambda sampling, position, like_V: torch.zeros(VOCAB)
    )
    here = place(temperature=1.0, top_k=1)
    logits_V = torch.arange(VOCAB).float()
    shapes = {ONE_ROW: here.scores(logits_V), AS_DECODED: here.scores(logits_V) + 0.1}
    found = judge(shapes, None, VOCAB - 1, VOCAB - 3, here.could_take)
    assert found.verdict == "broken rule"
    assert "cannot let our token win" in found.reason


def test_forbidden_tokens_are_no_noise_and_no_tie():
    scores_V = torch.tensor([5.0, 4.0, -torch.inf])
    shapes = {ONE_ROW: scores_V, AS_DECODED: scores_V + 0.5}
    found = judge(shapes, None, 0, 2)
    assert (found.verdict, found.rounding_spread) == ("broken rule", pytest.approx(0.5))


@pytest.mark.parametrize(
    "decode",
    [
        {"temperature": 1.0, "top_p": 0.8, "top_k": 12, "min_p": 0.02},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.6, "presence_penalty": 0.3},
        {"temperature": 1.2, "logit_bias": {20: 4.0, 30: -100.0}, "min_tokens": 12},
        {"stop": ("zz",), "temperature": 1.0},
    ],
)
@pytest.mark.parametrize("strategy", ["chain", "fused_tree"])
def test_the_scores_of_a_place_are_highest_for_what_was_committed(decode, strategy):
    orthrus = tiny_orthrus()
    config = decode_config(strategy=strategy, max_new_tokens=24, seed=5, **decode)
    prompt_ids = orthrus.base.encode_prompt("a tiny prompt")
    ids = orthrus.stream_ids(prompt_ids, config).drain().token_ids
    for position in (0, 1, len(ids) // 2, len(ids) - 1):
        ours = replay_ours(orthrus, prompt_ids, config, ids, position)
        here = Place(orthrus, prompt_ids, list(ids[:position]), config)
        assert ours.token == ids[position]
        found = here.scores(ours.logits_V, filtered=True)
        assert int(found.argmax()) == ids[position]


def test_a_replay_gives_the_answer_again_and_leaves_the_engine_alone():
    orthrus = tiny_orthrus()
    request = orthrus.submit([5, 6, 7], decode_config(strategy="tree", max_new_tokens=20, temperature=1.0))
    while not request.closed:
        orthrus.engine.step()
    answered = Answered.of(request)
    num_free = orthrus.engine.scheduler.pool.num_free
    replay = PlainReplay(orthrus, answered)
    while not replay.done:
        replay.step()
    assert answered.config.sampling.seed == request.seed
    assert replay.difference is None
    assert replay.token_ids == tuple(request.token_ids)
    assert orthrus.engine.scheduler.pool.num_free == num_free


def test_the_first_difference_is_where_one_ends_at_the_latest():
    assert first_difference([1, 2, 3], [1, 2, 3]) == 3
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [1]) == 0
