"""Corrections follow what passes take, forgive outliers, and never make one class an island."""

import pytest

from orthrus.decoding.cost_table import CostTable
from orthrus.decoding.price_correction import CLASSES, PriceCorrection
from orthrus.decoding.prices import Prices


def test_nothing_seen_corrects_nothing() -> None:
    assert [PriceCorrection()(n) for n in (1, 5, 64, 1000)] == [1.0] * 4


def test_each_class_finds_its_own_factor_and_way_back() -> None:
    correction = PriceCorrection()
    for _ in range(300):
        correction.observe(1, 10.0, 16.0)
        correction.observe(8, 12.0, 24.0)
    assert correction(1) == pytest.approx(1.6, rel=0.05)
    assert correction(8) == correction(5) == pytest.approx(2.0, rel=0.05)
    for _ in range(300):
        correction.observe(1, 10.0, 10.0)
        correction.observe(8, 12.0, 12.0)
    assert correction(1) == pytest.approx(1.0, rel=0.05)
    assert correction(8) == pytest.approx(1.0, rel=0.05)


def test_rows_that_are_not_tried_follow_those_that_are() -> None:
    correction = PriceCorrection()
    for _ in range(20):
        correction.observe(8, 10.0, 30.0)
    factors = [correction(n) for n in (8, 4, 2, 1)]
    assert factors == sorted(factors, reverse=True)
    assert factors[1] > 1.3
    # Only plain passes run from here on: the dear ones are forgiven with them.
    for _ in range(200):
        correction.observe(1, 10.0, 10.0)
    assert correction(8) < factors[0]


def test_one_hiccup_moves_little() -> None:
    correction = PriceCorrection()
    correction.observe(1, 10.0, 4000.0)
    assert correction(1) < 1.2


@pytest.mark.parametrize(("price", "measured"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_times_that_say_nothing_are_left_out(price: float, measured: float) -> None:
    correction = PriceCorrection()
    correction.observe(1, price, measured)
    assert correction(1) == 1.0


def test_any_number_of_rows_has_a_class() -> None:
    correction = PriceCorrection()
    for n in range(1, 2 * CLASSES[-1]):
        correction.observe(n, 1.0, 1.5)
    assert 1.0 < correction(10**6) <= 1.5


def test_prices_of_all_passes_change_together_and_not_with_noise() -> None:
    """A change of one class alone would make its passes look dear beside the others."""
    rows, flat = (1, 128), (10.0, 10.0)
    prices = Prices(CostTable(rows, flat, (0.0, 0.0), rows, (0.0, 0.0), rows, flat, (1, 2), (0.5, 0.5)))
    for i in range(200):
        prices.observe(1, 0, 0, 10.4 if i % 2 else 9.6)
    assert prices.version == 0
    assert (prices(1), prices(16)) == (10.0, 10.0)
    before = 0
    for _ in range(100):
        prices.observe(1, 0, 0, 20.0)
        if prices.version != before:
            before = prices.version
            # A pass of another class follows by its share, at the same time.
            assert prices(1) > prices(2) > prices(16) > 10.0
    assert 19.0 < prices(1) < 21.0
    # Each change clears what was computed from the prices.
    assert before <= 10
