"""Corrections follow what passes take, forgive outliers, and never make one class an island."""

import pytest

from orthrus.decoding.price_correction import CLASSES, PriceCorrection


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
