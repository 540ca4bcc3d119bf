"""Nodes of several requests compete for the rows of a pass: against all ways to choose them."""

import random
from itertools import product

import pytest

from orthrus.decoding.compete import num_winners


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_is_worth_more(seed: int) -> None:
    chance = random.Random(seed)
    chances = [sorted((chance.random() for _ in range(chance.randint(0, 4))), reverse=True) for _ in range(4)]
    prices = [0.0]
    for _ in range(sum(map(len, chances))):
        prices.append(prices[-1] + chance.choice([0.1, 0.4, 1.5]))
    rate = chance.choice([0.3, 1.0, 3.0])

    def worth(nums: tuple[int, ...]) -> float:
        promised = sum(sum(some[:num]) for some, num in zip(chances, nums, strict=True))
        return promised - rate * prices[sum(nums)]

    won = tuple(num_winners(chances, prices.__getitem__, rate))
    best = max(map(worth, product(*(range(len(some) + 1) for some in chances))))
    assert worth(won) == pytest.approx(best, abs=1e-12)


def test_a_dear_first_row_is_worth_it_for_many_nodes_alone() -> None:
    def added_ms(num: int) -> float:
        return 1.3 + 0.3 * (num - 1) if num else 0.0

    assert num_winners([[0.8], [], []], added_ms, 1.0) == [0, 0, 0]
    assert num_winners([[0.8], [0.9, 0.8], [0.2]], added_ms, 1.0) == [1, 2, 0]


def test_certain_tokens_are_taken_from_the_front() -> None:
    assert num_winners([[1.0, 1.0, 1.0], [1.0]], lambda num: 0.5 * num + (num > 2) * 9.0, 1.0) == [1, 1]


def test_nothing_to_choose_from() -> None:
    assert num_winners([[], []], float, 1.0) == [0, 0]
    assert num_winners([], float, 1.0) == []
