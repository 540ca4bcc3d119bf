"""The policy's decisions on machines made up for the purpose, against brute force and common sense."""

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log

import pytest

from orthrus.decoding.compete import num_winners
from orthrus.decoding.cost_table import CostTable
from orthrus.decoding.policy import Left, Policy
from orthrus.decoding.prices import Prices

ROWS = (1, 8, 16, 32, 64)


def table(body_ms: tuple[float, ...], head_ms: tuple[float, ...]) -> CostTable:
    """Block rows cost what AR rows do."""
    added = tuple(ms - body_ms[0] for ms in body_ms)
    block_rows = tuple(n - 1 for n in ROWS)
    return CostTable(
        ROWS, body_ms, head_ms, block_rows[1:], added[1:], block_rows, body_ms, (1, 2), head_ms[:1] * 2
    )


FLAT = table((10.0, 10.1, 10.2, 10.4, 10.8), (0.1, 0.1, 0.1, 0.1, 0.1))
"""A GPU: rows cost next to nothing."""
STEEP = table((10.0, 80.0, 160.0, 320.0, 640.0), (0.1, 0.8, 1.6, 3.2, 6.4))
"""A machine that computes every row one after the other: drafts can never win."""
MIDDLE = table((10.0, 12.0, 15.0, 20.0, 32.0), (1.0, 1.5, 2.0, 3.0, 5.0))
TABLES = {"flat": FLAT, "middle": MIDDLE, "steep": STEEP}


def policy(costs: CostTable | Prices, max_nodes: int = 24, max_blocks: int = 3) -> Policy:
    return Policy(prices(costs), most_guesses=6, max_nodes=max_nodes, max_blocks=max_blocks)


def prices(costs: CostTable | Prices) -> Prices:
    return costs if isinstance(costs, Prices) else Prices(costs)


def nodes(decider: Policy, log_probs: list[float], *, stale: bool = False, trying: bool = False) -> int:
    """Of a chain, and of further nodes as deep as its last one."""
    depths = [min(i, 6) for i in range(1, len(log_probs) + 1)]
    return decider.num_nodes(log_probs, depths, 6, stale=stale, trying=trying)


def verify(
    decider: Policy,
    log_probs: list[float],
    num_accepted: int,
    block_probs: Sequence[float] = (),
    *,
    stale: bool = False,
    left: Left = "none",
) -> None:
    """All nodes of a tree, whatever the policy would have taken."""
    nodes(decider, log_probs, stale=stale, trying=True)
    decider.observe(log_probs, num_accepted, block_probs, stale=stale, left=left)


def test_a_view_starts_from_its_own_chance_that_guesses_go_on() -> None:
    hopeful, hopeless = (Policy(prices(MIDDLE), 6, 24, 3, goes_on=chance) for chance in (0.8, 0.0))
    assert hopeful.wants_draft()
    assert not hopeless.wants_draft()
    assert hopeful.draft_rate > policy(MIDDLE).draft_rate > hopeless.draft_rate
    # What is seen corrects it, and a draft of a short block too.
    for decider in (hopeful, hopeless):
        decider.num_nodes([-0.5], [1], 1, stale=False, trying=True)
        decider.observe([-0.5], 0, (), stale=False, left="none")
    for _ in range(40):
        verify(hopeless, [-0.01, -0.02, -0.03, -0.04, -0.05, -0.06], 6)
        verify(hopeful, [-3.0, -6.0, -9.0, -12.0, -15.0, -18.0], 0)
    assert hopeless.draft_rate > hopeful.draft_rate


def test_costs_interpolate_and_extrapolate() -> None:
    rows, body_ms, head_ms = (1, 3, 5), (10.0, 14.0, 24.0), (1.0, 1.0, 2.0)
    costs = CostTable(rows, body_ms, head_ms, (2, 4), (3.0, 7.0), (1, 2), (11.0, 12.0), (1, 2), (0.5, 0.5))
    assert costs(1) == pytest.approx(11.0)
    assert costs(2) == pytest.approx(13.0)
    assert costs(4) == pytest.approx(19.0 + 1.5)
    assert costs(7) == pytest.approx(34.0 + 3.0)
    # Block rows cost their body, and a head beside that of the AR rows where they are projected.
    assert costs(3, 2) == pytest.approx(14.0 + 1.0 + 3.0)
    # But the pass that most drafts come from is known.
    assert costs(1, 2) == pytest.approx(12.0 + 1.0)
    assert costs(1, 1, 2) == pytest.approx(11.0 + 1.0)
    assert costs(1, 3, 3) == pytest.approx(10.0 + 1.5 + 5.0)
    # Fewer block rows than were timed are not free, where a line through the others would say so.
    steep = CostTable(rows, body_ms, head_ms, (4, 8), (4.0, 40.0), (1, 2), (11.0, 12.0), (1, 2), (0.5, 0.5))
    assert steep(3, 2) == pytest.approx(14.0 + 1.0 + 2.0)


def test_guesses_share_the_head_while_they_are_few_and_have_none_of_their_own() -> None:
    costs = CostTable(
        (1, 33), (10.0, 10.0), (1.0, 33.0), (8, 80), (0.0, 0.0), (1, 7), (10.0, 10.0), (1, 2), (0.5, 0.5)
    )
    shared, own = (Policy(prices(costs), 6, 24, 5, own_head=own) for own in (False, True))
    assert shared.pass_ms(3, 3) == pytest.approx(10.0 + 4 + 18)
    # 30 guesses wait until one block has been chosen; its product is part of making a draft then.
    assert shared.pass_ms(3, 5) == pytest.approx(10.0 + 4)
    assert own.pass_ms(3, 3) == pytest.approx(10.0 + 4)


def test_where_rows_are_free_everything_is_drafted() -> None:
    decider = policy(FLAT)
    assert decider.wants_draft()
    log_probs = [log(0.9 * 0.8**i) for i in range(24)]
    assert nodes(decider, log_probs) == 24
    assert decider.num_blocks(24, [0.4, 0.3, 0.2, 0.1]) == 3


def test_where_drafts_can_never_win_none_is_made() -> None:
    decider = policy(STEEP)
    assert not any(decider.wants_draft() for _ in range(2000))
    assert nodes(decider, [log(0.5)] * 24) == 0


def test_where_drafts_fall_decoding_is_plain_but_for_a_chance_now_and_then() -> None:
    decider = policy(MIDDLE)
    for _ in range(40):
        verify(decider, [log(0.6), log(0.4)], 0)
    chances = [i for i in range(2000) if decider.wants_draft() and _waste(decider)]
    assert chances[0] == Policy.PATIENCE
    gaps = [b - a for a, b in pairwise(chances)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == Policy.MOST_PATIENCE + 1
    assert len(chances) / 2000 < 0.01


def test_there_is_no_chance_while_the_company_makes_drafts_dear() -> None:
    decider = policy(Prices(table((10.0, 12.0, 15.0, 60.0, 124.0), (0.1, 0.2, 0.3, 0.4, 0.5))))
    for _ in range(40):
        verify(decider, [log(0.6), log(0.4)], 0)
    decider.among(16)
    assert not any(decider.wants_draft() for _ in range(2000))
    decider.among(1)
    assert decider.wants_draft()


def _waste(decider: Policy) -> bool:
    verify(decider, [log(0.5)], 0)
    return True


@pytest.mark.parametrize("costs", TABLES.values(), ids=TABLES)
def test_nodes_maximise_tokens_less_the_worth_of_their_time(costs: CostTable) -> None:
    decider = policy(costs)
    for accepted in (0, 1, 4, 2, 6, 0, 0, 3):
        stale = accepted > 3
        trust = (decider._stale_trust if stale else decider._fresh_trust).value
        log_probs = [log(0.7) + log(0.6) * (i // 3) for i in range(24)]
        for trying, rate in ((False, decider.rate()), (True, decider.draft_rate)):
            values = [sum(trust * exp(p) for p in log_probs[:n]) - rate * costs(1 + n) for n in range(25)]
            best = max(range(25), key=values.__getitem__)
            assert nodes(decider, log_probs, stale=stale, trying=trying) == best
        left: Left = "fresh" if accepted > 1 else "none"
        decider.observe(log_probs[:6], accepted, [0.3], stale=stale, left=left)


def chain_of(decider: Policy, prob: float) -> list[float]:
    """Path log probs of a chain as long as the blocks that the policy asks for, each guess as sure."""
    return [log(prob) * i for i in range(1, decider.block_size)]


def drafted(decider: Policy, prob: float) -> None:
    """A fresh draft that keeps what it promises."""
    log_probs = chain_of(decider, prob)
    depths = range(1, len(log_probs) + 1)
    num_nodes = decider.num_nodes(log_probs, depths, len(log_probs), stale=False, trying=True)
    num_accepted = round(sum(exp(p) for p in log_probs[:num_nodes]))
    decider.observe(log_probs[:num_nodes], num_accepted, [], stale=False, left="none")


def test_blocks_are_long_where_rows_are_free_and_short_where_guesses_fall() -> None:
    free, costly = policy(FLAT), policy(MIDDLE)
    for _ in range(30):
        drafted(free, 0.7)
        drafted(costly, 0.3)
    assert free.block_size == 7
    assert costly.block_size < 4


@pytest.mark.parametrize("costs", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("prob", [0.3, 0.6, 0.9])
def test_the_length_of_blocks_is_what_brute_force_finds(costs: CostTable, prob: float) -> None:
    decider = policy(costs, max_blocks=0)
    for _ in range(60):
        drafted(decider, prob)
    rates = {}
    for size in (2, 3, 4, 5, 7):
        for num_nodes in range(size):
            tokens = 2 + sum(prob**i for i in range(1, num_nodes + 1))
            ms = costs(1, size, size - 1) + costs(1 + num_nodes) + costs.draft_ms(size - 1)
            rates[size, num_nodes] = tokens / ms
    best = max(rates.values())
    # What is longer than what was tried is expected to be a little better than it is.
    assert max(rate for (size, _), rate in rates.items() if size == decider.block_size) > 0.95 * best


def test_blocks_grow_again_where_guesses_come_to_stand() -> None:
    decider = policy(MIDDLE)
    for _ in range(40):
        drafted(decider, 0.2)
    short = decider.block_size
    for _ in range(40):
        drafted(decider, 0.95)
    assert short < 4 < decider.block_size


def test_stale_drafts_do_not_tell_how_many_nodes_fresh_ones_need() -> None:
    mixed, fresh = policy(FLAT), policy(FLAT)
    for _ in range(100):
        verify(mixed, [log(0.8)], 1, stale=True, left="stale")
        for decider in (mixed, fresh):
            verify(decider, [log(0.8) * i for i in range(1, 7)], 3)
    assert [n.num_nodes.value for n in mixed._lengths] == [n.num_nodes.value for n in fresh._lengths]


def test_drafts_that_fall_end_drafting_and_drafts_that_stand_bring_it_back() -> None:
    decider = policy(MIDDLE)
    assert decider.wants_draft()
    for _ in range(40):
        verify(decider, [log(0.6), log(0.4)], 0)
    assert not decider.wants_draft()
    assert decider.draft_rate < decider.plain_rate
    for _ in range(10):
        verify(decider, [log(0.6), log(0.4)], 5)
    assert decider.wants_draft()


def test_a_view_that_overrates_itself_is_trusted_less() -> None:
    modest, boastful = policy(MIDDLE), policy(MIDDLE)
    for _ in range(20):
        # Both see one draft of two stand; one had promised as much, the other twice that.
        verify(modest, [log(0.6), log(0.4)], 1)
        verify(boastful, [log(0.99), log(0.98)], 1)
    log_probs = [log(0.8 * 0.75**i) for i in range(24)]
    assert nodes(boastful, log_probs) < nodes(modest, log_probs)


def test_blocks_that_are_never_met_are_left_out() -> None:
    decider = policy(FLAT)
    ends = [0.5, 0.3, 0.1]
    assert decider.num_blocks(4, ends) > 1
    for _ in range(30):
        verify(decider, [log(0.8)], 3, ends, left="none")
        verify(decider, [log(0.8)], 0, ends, stale=True, left="none")
    assert not decider.keeps_stale()
    assert decider.num_blocks(4, ends) == 0


def test_one_block_is_enough_where_stale_drafts_stand_as_well_as_fresh_ones() -> None:
    decider = policy(FLAT)
    ends = [0.3, 0.3, 0.2, 0.2]
    assert decider.num_blocks(4, ends) > 1
    for _ in range(40):
        verify(decider, [log(0.8)] * 3, 2, ends[:1], stale=True, left="stale")
        verify(decider, [log(0.8)] * 3, 2, ends[:1], left="fresh")
    assert decider.keeps_stale()
    assert decider.num_blocks(4, ends) == 1


def test_stale_drafts_that_fall_are_not_kept() -> None:
    decider = policy(FLAT)
    assert decider.keeps_stale()
    for _ in range(20):
        verify(decider, [log(0.8)] * 3, 4, [0.5], left="fresh")
        verify(decider, [log(0.8)] * 3, 0, [0.5], stale=True, left="stale")
    assert not decider.keeps_stale()


def test_stale_drafts_get_another_chance() -> None:
    decider = policy(FLAT)
    for _ in range(5):
        verify(decider, [log(0.8)] * 3, 0, [0.5], stale=True, left="stale")
        verify(decider, [log(0.8)] * 3, 3, [0.5], left="fresh")
    assert not decider.keeps_stale()
    tried = 0
    while not decider.keeps_stale():
        verify(decider, [log(0.8)] * 3, 3, [0.5], left="fresh")
        tried += 1
        assert tried < 200
    assert tried > 1


def test_stale_drafts_that_promised_little_get_another_chance_too() -> None:
    decider = policy(FLAT)
    for _ in range(8):
        verify(decider, [log(0.05)] * 3, 0, [0.5], stale=True, left="stale")
    for _ in range(3):
        verify(decider, [log(0.95)] * 7, 6, [0.5], left="fresh")
    assert not decider.keeps_stale()
    tried = 0
    while not decider.keeps_stale():
        verify(decider, [log(0.9)] * 4, 4, [0.5], left="fresh")
        tried += 1
        assert tried < 50


def test_a_block_at_the_anchor_that_leaves_nothing_is_not_made() -> None:
    decider = policy(MIDDLE)
    ends = [0.1, 0.1, 0.1]
    for _ in range(30):
        verify(decider, [log(0.8)] * 3, 3, ends[:1], left="none")
    assert decider.num_blocks(3, ends) == 0


def test_beside_a_prompt_rows_cost_their_full_price() -> None:
    log_probs = [log(0.7) * i for i in range(1, 7)]
    cheap_at_first = table((10.0, 10.5, 11.0, 24.0, 56.0), (0.1, 0.2, 0.3, 0.4, 0.5))
    decider = policy(Prices(cheap_at_first))
    decider.among(2)
    alone = nodes(decider, log_probs)
    decider.among(2, 64)
    beside = nodes(decider, log_probs)
    assert alone > beside
    # What is paid for anyway makes no draft dearer or cheaper: only the slope beyond it counts.
    straight = policy(Prices(table((10.0, 17.0, 25.0, 41.0, 73.0), (0.1, 0.1, 0.1, 0.1, 0.1))))
    straight.among(4)
    rates = straight.plain_rate, straight.pass_ms(3, 0), straight.pass_ms(0, 1)
    straight.among(4, 64)
    assert (straight.plain_rate, straight.pass_ms(3, 0)) == pytest.approx(rates[:2])
    straight.among(4)
    assert (straight.plain_rate, straight.pass_ms(3, 0), straight.pass_ms(0, 1)) == rates


class Dearer(Policy):
    SHARED = 5.0


def test_policies_that_share_prices_decide_as_with_prices_of_their_own() -> None:
    kinds = [(kind, own) for kind in (Policy, Dearer) for own in (False, True)]
    together = Prices(MIDDLE)
    shared = [kind(together, 6, 24, 3, own_head=own) for kind, own in kinds]
    for busy in (False, True):
        for company in ((1, 0), (4, 0), (4, 32), (16, 0)):
            for decider, (kind, own) in zip(shared, kinds, strict=True):
                alone = kind(Prices(MIDDLE), 6, 24, 3, own_head=own)
                for each in (together, alone.costs) if busy else ():
                    while each.version == 0:
                        each.observe(1, 0, 0, 3 * MIDDLE(1))
                decider.among(*company)
                alone.among(*company)
                for num_nodes, num_blocks in ((0, 0), (3, 0), (3, 1), (8, 2), (0, 1)):
                    assert decider.pass_ms(num_nodes, num_blocks) == alone.pass_ms(num_nodes, num_blocks)
                assert decider.least_chance(12) == alone.least_chance(12)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("company", [(1, 0), (4, 0), (16, 0), (4, 32)])
def test_a_chain_whose_first_node_is_too_unlikely_never_pays(name: str, company: tuple[int, int]) -> None:
    decider = policy(TABLES[name])
    decider.among(*company)
    least = decider.least_chance(12)
    for first in (0.99 * least, 0.5 * least):
        if first >= 1.0:
            continue
        for num_nodes in range(1, 13):
            # All other nodes are certain.
            log_probs = [log(first)] * num_nodes
            assert decider.worth(log_probs, [False] * num_nodes, stale=False) == 0
            assert decider.chain_rate([first * n for n in range(1, num_nodes + 1)]) <= decider.rate()
            assert not any(won_together(decider, first, num_nodes, company))
    if 1.01 * least < 1.0:
        assert any(any(won_together(decider, 1.01 * least, n, company)) for n in range(1, 13))


def won_together(decider: Policy, chance: float, num_nodes: int, company: tuple[int, int]) -> list[int]:
    """How many nodes of each request are verified where all of the company offer as many, of the same chance."""
    num_requests, num_prompt_rows = company
    num_rows = num_prompt_rows + num_requests
    return num_winners(
        [[chance] * num_nodes] * num_requests,
        lambda num: decider.costs(num_rows + num) - decider.costs(num_rows),
        decider.rate(),
    )
