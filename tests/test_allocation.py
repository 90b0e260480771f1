"""The allocation is the best there is, and the search finds what the sum of errors hides."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.allocation import allocate, search

numbers = st.floats(0.01, 1)
tables = st.lists(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(tables, st.floats(0.1, 3))
def test_no_other_choice_in_budget_has_less_error(table, budget):
    costs = [np.array([cost for cost, _ in levels]) for levels in table]
    errors = [np.array([error for _, error in levels]) for levels in table]
    found = allocate(costs, errors, budget)

    def sums(chosen):
        pairs = [levels[at] for levels, at in zip(table, chosen, strict=True)]
        return sum(cost for cost, _ in pairs), sum(error for _, error in pairs)

    choices = [sums(chosen) for chosen in product(*(range(len(levels)) for levels in table))]
    # Costs are rounded up to a bucket each.
    surely = [error for cost, error in choices if cost <= budget * (1 - len(table) / 10_000)]
    if found is None:
        assert not surely
    else:
        cost, error = sums(found)
        assert cost <= budget * (1 + 1e-6)
        assert error <= min(surely, default=np.inf) + 1e-9


def test_nothing_fits_no_budget():
    assert allocate([np.array([1.0])], [np.array([0.0])], 0.5) is None
    assert allocate([np.array([0.0])], [np.array([0.0])], -1) is None
    assert allocate([np.array([0.0, 1e9])], [np.array([1.0, 0.0])], 0) == (0,)


def test_the_search_learns_which_group_matters():
    # By their own errors the groups are alike, but the loss is that of the first alone.
    costs = [np.array([1.0, 0.5, 0.0])] * 4
    errors = [np.array([0.0, 0.3, 1.0])] * 4

    def loss(levels):
        return float(errors[0][levels[0]]) + 0.01 * sum(levels)

    first = allocate(costs, errors, 2.0)
    found = search(costs, errors, 2.0, loss, steps=range(60))
    assert loss(first) > 0.25
    assert found is not None
    assert found[0] == 0
    assert sum(costs[0][at] for at in found) == pytest.approx(2.0)
    assert search(costs, errors, -1.0, loss, steps=range(1)) is None
