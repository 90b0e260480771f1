"""Sums over all outcomes, against a sum that is written out."""

import math

import numpy as np
import pytest

from pipeline import exact


def all_outcomes(examples):
    """Yield every b and c."""
    return ((b, c) for b in range(examples + 1) for c in range(examples + 1 - b))


@pytest.mark.parametrize(
    ("examples", "allowed", "drop", "discordant"),
    [(40, 0.05, 0.05, 0.1), (40, 0.2, 0.2, 0.2), (30, 0.2, 0.0, 0.9), (25, 0.1, 0.1, 1.0)],
)
def test_a_chance_is_the_sum_over_all_outcomes(examples, allowed, drop, discordant):
    region = exact.accepted(examples, allowed, 0.95)
    lost, won = (discordant + drop) / 2, (discordant - drop) / 2
    expected = sum(
        math.comb(examples, b) * math.comb(examples - b, c)
        * lost**b * won**c * (1 - discordant) ** (examples - b - c)
        for b, c in all_outcomes(examples)
        if b <= region[c]
    )  # fmt: skip
    assert exact.chance(region, drop, discordant) == pytest.approx(expected, abs=1e-9)


def test_what_passes_one_by_one_is_the_accepted_region():
    for examples, allowed in ((20, 0.2), (30, 0.1)):
        region = exact.accepted(examples, allowed, 0.95)
        for b, c in all_outcomes(examples):
            if abs(b - region[c]) > 1:
                continue  # far from the border
            assert exact.passes(b, c, examples, allowed, 0.95) == (b <= region[c]), (b, c)


def test_tangos_test_alone_lets_too_much_through_where_nothing_flips():
    # 0.99 ** 268: the chance that none of 268 examples shows a drop of a point.
    tango = exact.above(268, 0.01, 1.6448536)
    assert tango[0] == 0
    assert exact.chance(tango, 0.01, 0.01) == pytest.approx(0.99**268)
    assert not exact.passes(0, 0, 268, 0.01, 0.95)
    assert exact.passes(0, 0, 299, 0.01, 0.95)  # 0.99 ** 299 is just below 0.05
    assert not exact.passes(0, 0, 298, 0.01, 0.95)


@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_the_confidence_is_kept_at_every_share_of_discordant_examples(confidence):
    for examples, allowed in ((80, 0.05), (300, 0.01)):
        region = exact.accepted(examples, allowed, confidence)
        found = [exact.chance(region, allowed, x) for x in np.geomspace(allowed, 1.0, 100)]
        assert max(found) <= 1.03 * (1 - confidence)


def test_no_outcome_has_no_chance():
    assert exact.chance(np.full(11, -1), 0.1, 0.2) == 0.0
