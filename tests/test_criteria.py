"""Scores: properties that every criterion has, and closed forms."""

import pytest
import torch

from pipeline.criteria import CRITERIA, Evidence, importance, magnitude


def evidence() -> Evidence:
    torch.manual_seed(0)
    return Evidence(torch.randn(6, 20), torch.randn(50, 6))


@pytest.mark.parametrize("name", CRITERIA)
class TestCriterion:
    def test_scores_each_unit_once_and_not_below_zero(self, name):
        scores = CRITERIA[name](evidence())
        assert scores.shape == (6,)
        assert bool((scores >= 0).all())
        assert bool(torch.isfinite(scores).all())

    def test_follows_the_units(self, name):
        order = torch.tensor([3, 1, 5, 0, 2, 4])
        known = evidence()
        moved = Evidence(known.weights[order], known.gradients[:, order])
        torch.testing.assert_close(CRITERIA[name](moved), CRITERIA[name](known)[order])

    def test_a_dead_unit_matters_least(self, name):
        known = evidence()
        known.weights[2] = 0
        known.gradients[:, 2] = 0
        assert CRITERIA[name](known).argmin() == 2

    def test_units_that_are_all_dead_have_numbers(self, name):
        dead = Evidence(torch.zeros(6, 20), torch.zeros(50, 6))
        assert bool((CRITERIA[name](dead) == 0).all())


def test_magnitude_is_the_squared_norm():
    assert magnitude(Evidence(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))).tolist() == [25.0, 1.0]


def test_importance_is_the_normalised_mean_of_absolute_gradients():
    gradients = torch.tensor([[3.0, -8.0], [-3.0, 0.0]])  # mean absolute: 3 and 4
    found = importance(Evidence(torch.zeros(2, 1), gradients))
    torch.testing.assert_close(found, torch.tensor([0.6, 0.8]))
