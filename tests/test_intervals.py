"""Bounds against scipy's, and against published values."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, ttest_1samp

from pipeline import intervals


def test_tango_gives_the_published_values():
    # Tango 1998, the contact lens example: n = 44, b = 1, c = 0, difference -0.1.
    assert float(intervals.tango(1, 0, 44, -0.1)) == pytest.approx(1.709, abs=5e-4)
    low, high = intervals.tango_interval(1, 0, 44, 0.95)
    assert (low, high) == (pytest.approx(-0.0957, abs=5e-5), pytest.approx(0.0365, abs=5e-5))


def test_tango_is_0_where_all_is_as_expected():
    assert float(intervals.tango(0, 0, 50, 0.0)) == 0.0


@pytest.mark.parametrize(("count", "examples"), [(0, 100), (3, 100), (97, 100), (100, 100)])
def test_a_share_has_the_bounds_of_clopper_and_pearson(count, examples):
    expected = binomtest(count, examples).proportion_ci(0.90, method="exact")
    found = intervals.share_interval(count, examples, 0.95)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_binomial_probabilities_are_scipys():
    logs = intervals.log_factorials(30)
    for share in (0.0, 0.2, 1.0):
        found = intervals.binomial(np.arange(31), np.asarray(30), share, logs)
        assert found == pytest.approx(binom.pmf(np.arange(31), 30, share), abs=1e-12)
    assert intervals.binomial(np.asarray(5), np.asarray(4), 0.5, logs) == 0.0


def test_a_mean_has_students_bounds():
    values = np.random.default_rng(0).normal(0.1, 1, 40)
    expected = ttest_1samp(values, 0).confidence_interval(0.90)
    found = intervals.mean_interval(values, 0.95)
    assert found == pytest.approx((expected.low, expected.high))


def test_one_example_more_is_counted_where_none_was_lost():
    low, high = intervals.mean_interval(np.zeros(99), 0.95, most=1.0)
    lost = np.append(np.zeros(99), 1.0)
    assert high == pytest.approx(ttest_1samp(lost, 0).confidence_interval(0.90).high)
    assert low == pytest.approx(-high)


def test_a_bootstrap_of_equal_outcomes_is_no_proof():
    costs = np.arange(7) / 100
    low, high = intervals.bootstrap_interval(lambda _: 0.0, 100, 0.95, lost=costs, won=costs)
    assert (low, high) == (-0.03, 0.03)  # the 95 % quantile of a Poisson count with mean 1 is 3


def test_a_bootstrap_spreads_as_the_mean_does():
    values = np.random.default_rng(1).normal(0.1, 1, 400)
    costs = np.arange(7) / 400
    low, high = intervals.bootstrap_interval(
        lambda places: float(values[places].mean()), 400, 0.95, lost=costs, won=costs
    )
    expected = ttest_1samp(values, 0).confidence_interval(0.90)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.015)
