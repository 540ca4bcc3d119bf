"""How much is drafted inside vLLM: with made-up acceptance and times, and a clock that nobody waits for."""

import random

import pytest

from orthrus.integrations.vllm.adaptive import DraftPolicy, accepted
from orthrus.integrations.vllm.step_times import StepTimes


class World:
    """Steps cost what `step_ms` says of (requests, verified, drafted); each draft stands with `chance`."""

    def __init__(self, chance: float, plain_ms: float, row_ms: float, draft_ms: float, seed: int = 0) -> None:
        self.chance, self.plain_ms, self.row_ms, self.draft_ms = chance, plain_ms, row_ms, draft_ms
        self.random = random.Random(seed)
        self.tokens = 0
        self.ms = 0.0
        self.drafted_steps = self.steps = self.last = 0

    def run(self, policy: DraftPolicy, steps: int, num_requests: int = 1) -> None:
        for _ in range(steps):
            drafts = policy.choose(num_requests)
            for _ in range(num_requests if self.last else 0):
                accepted = 0
                while accepted < self.last and self.random.random() < self.chance:
                    accepted += 1
                policy.see_drafts(num_requests, self.last, accepted)
                self.tokens += accepted
            self.tokens += num_requests
            ms = self.plain_ms + self.row_ms * num_requests * (1 + self.last)
            if drafts:
                ms += self.draft_ms + self.row_ms * num_requests * (1 + drafts)
            seen_ms = ms * self.random.uniform(0.97, 1.03)
            rows = num_requests * (1 + drafts) if drafts else 0
            policy.see_rows(num_requests * (1 + self.last), rows, seen_ms)
            policy.see_step(num_requests, self.last, drafts, seen_ms)
            self.ms += ms
            self.steps, self.drafted_steps = self.steps + 1, self.drafted_steps + bool(drafts)
            self.last = drafts

    def drafted_of(self, policy: DraftPolicy, steps: int = 100) -> int:
        """Of so many steps more, those that drafted."""
        before = self.drafted_steps
        self.run(policy, steps)
        return self.drafted_steps - before

    def over_plain(self, num_requests: int = 1) -> float:
        """Speed against steps that draft nothing, of so many requests."""
        return self.tokens / self.ms * (self.plain_ms / num_requests + self.row_ms)


def test_good_drafts_are_kept() -> None:
    world = World(chance=0.8, plain_ms=20, row_ms=1, draft_ms=20)
    world.run(DraftPolicy(7), 2000)
    assert world.drafted_steps > 0.95 * world.steps
    assert world.over_plain() > 1.5


def test_worthless_drafts_stop_and_cost_less_than_a_twentieth() -> None:
    world = World(chance=0.05, plain_ms=20, row_ms=1, draft_ms=20)
    policy = DraftPolicy(7)
    world.run(policy, 2000)
    assert policy.choose(1) == 0
    assert world.over_plain() > 0.95


def test_drafting_comes_back_when_it_pays_again() -> None:
    world = World(chance=0.02, plain_ms=20, row_ms=1, draft_ms=20)
    policy = DraftPolicy(7)
    world.run(policy, 300)
    assert world.drafted_steps < 40
    world.chance = 0.9
    world.run(policy, 3000)
    assert policy.rates(1)[7] > policy.rates(1)[0]
    assert world.drafted_of(policy) > 90


def test_much_company_may_want_fewer_drafts_than_none() -> None:
    """Rows that cost their full price: what one request drafts with profit, sixteen do not."""
    world = World(chance=0.75, plain_ms=40, row_ms=4, draft_ms=10)
    policy = DraftPolicy(7)
    world.run(policy, 400, num_requests=1)
    world.run(policy, 400, num_requests=16)
    rates = policy.rates(1), policy.rates(16)
    assert max(rates[0], key=rates[0].__getitem__) > max(rates[1], key=rates[1].__getitem__)


def test_with_much_company_no_trial_is_made_that_could_not_pay() -> None:
    """A trial among sixteen takes as long as thirty plain steps here, and two hundred steps are all there is."""
    world = World(chance=0.75, plain_ms=40, row_ms=8, draft_ms=10)
    policy = DraftPolicy(7)
    world.run(policy, 60, num_requests=1)
    for num_requests in (4, 8, 16):
        world.tokens, world.ms = 0, 0.0
        world.run(policy, 200, num_requests)
        assert world.over_plain(num_requests) > 0.97


def test_slow_steps_after_a_change_do_not_speak_for_plain_ones() -> None:
    """Three plain steps after a change take half as long again; drafts bring what they cost, and no more."""
    world = World(chance=0.72, plain_ms=28, row_ms=0, draft_ms=62)
    slow = iter([1.5, 1.4, 1.2])
    policy = DraftPolicy(7)
    for _ in range(100):
        plain = policy.choose(4) == 0 and world.last == 0
        world.plain_ms = 28 * (next(slow, 1.0) if plain else 1.0)
        world.run(policy, 1, num_requests=4)
    assert policy.choose(4) == 0
    assert policy.rates(4)[0] == pytest.approx(1 / 28, rel=0.05)


def test_a_busy_second_does_not_end_drafts_that_pay() -> None:
    world = World(chance=0.85, plain_ms=20, row_ms=1, draft_ms=20)
    policy = DraftPolicy(7)
    world.run(policy, 100)
    assert policy.choose(1) == 7
    world.plain_ms, world.draft_ms = 50, 50
    world.run(policy, 12)
    world.plain_ms, world.draft_ms = 20, 20
    assert world.drafted_of(policy) > 90


def test_drafts_that_a_step_alone_would_make_pay_by_little_are_not_worth_it() -> None:
    world = World(chance=0.72, plain_ms=30, row_ms=0, draft_ms=66)
    policy = DraftPolicy(7)
    world.run(policy, 400, num_requests=4)
    assert 1.0 < sum(0.72**place for place in range(8)) / 96 / (1 / 30) < 1.15
    assert policy.choose(4) == 0


def test_times_of_steps_not_seen_follow_from_their_rows() -> None:
    times = StepTimes()
    assert times.of_drafts(1, 7) is None
    for _ in range(20):
        for requests, drafts in ((1, 7), (2, 3), (4, 7), (1, 0), (3, 0)):
            ar, block = requests * (1 + drafts), requests * (1 + drafts) if drafts else 0
            times.see(ar, block, 40 + 2 * ar + (10 + 3 * block if drafts else 0))
    assert times.of_drafts(16, 0) == pytest.approx(40 + 2 * 16, rel=0.05)
    assert times.of_drafts(16, 7) == pytest.approx(50 + 5 * 128, rel=0.05)


def test_without_adapting_it_is_always_as_many() -> None:
    world = World(chance=0.0, plain_ms=20, row_ms=5, draft_ms=50)
    policy = DraftPolicy(5, adaptive=False)
    world.run(policy, 100)
    assert policy.choose(4) == 5
    assert world.drafted_steps == world.steps


@pytest.mark.parametrize(
    ("drafts", "sampled", "expected"),
    [([5, 6, 7], [5, 6, 9], (3, 2)), ([5], [8], (1, 0)), ([-1, -1], [8], (0, 0)), ([5, 6], [], (2, 0))],
)
def test_accepted_drafts_are_all_tokens_but_the_last(
    drafts: list[int], sampled: list[int], expected: tuple[int, int]
) -> None:
    assert accepted(drafts, sampled) == expected
