"""Scores: properties that every criterion has, and closed forms."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.criteria import (
    CRITERIA,
    RIDGE,
    Evidence,
    activation,
    fisher,
    fisher_full,
    flap,
    importance,
    magnitude,
    reconstruction,
    swap,
)

UNITS, WIDTH, OUTPUTS = 6, 3, 7


def evidence(seed: int = 0) -> Evidence:
    """Return six units, of three inputs each of a reader with a bias."""
    torch.manual_seed(seed)
    inputs = torch.randn(200, UNITS * WIDTH) @ torch.randn(UNITS * WIDTH, UNITS * WIDTH) + 0.5
    inputs = torch.cat([inputs, torch.ones(200, 1)], dim=1).double()
    return Evidence(
        weights=torch.randn(UNITS, 20),
        gradients=torch.randn(50, UNITS) @ torch.randn(UNITS, UNITS),
        reader=torch.randn(OUTPUTS, UNITS * WIDTH + 1),
        moments=inputs.T @ inputs,
        generator=torch.Generator().manual_seed(seed),
    )


def columns(units) -> torch.Tensor:
    return torch.tensor([unit * WIDTH + at for unit in units for at in range(WIDTH)])


def dead(known: Evidence, units) -> Evidence:
    """Return the evidence where some units give nothing."""
    known = replace(known, weights=known.weights.clone(), gradients=known.gradients.clone())
    known.weights[units], known.gradients[:, units] = 0, 0
    known.reader[:, columns(units)] = 0
    return known


INFORMED = [name for name in CRITERIA if name != "random"]


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_each_unit_once(name):
    scores = CRITERIA[name](evidence())
    assert scores.shape == (UNITS,)
    assert bool(torch.isfinite(scores).all())
    assert len(scores.unique()) > 1
    assert torch.equal(scores, CRITERIA[name](evidence()))


@pytest.mark.parametrize("name", INFORMED)
class TestCriterion:
    def test_follows_the_units(self, name):
        order, known = torch.tensor([3, 1, 5, 0, 2, 4]), evidence()
        at = torch.cat([columns(order), torch.tensor([UNITS * WIDTH])])
        moved = Evidence(
            known.weights[order],
            known.gradients[:, order],
            known.reader[:, at],
            known.moments[at][:, at],
        )
        torch.testing.assert_close(CRITERIA[name](moved), CRITERIA[name](known)[order])

    def test_a_dead_unit_matters_least(self, name):
        assert CRITERIA[name](dead(evidence(), [2])).argmin() == 2

    def test_units_that_are_all_dead_have_numbers(self, name):
        known = dead(evidence(), [*range(UNITS)])
        known.reader[:] = 0
        assert bool((CRITERIA[name](known) == 0).all())

    def test_a_reader_without_a_bias_will_do(self, name):
        known = evidence()
        known = replace(known, reader=known.reader[:, :-1])
        assert bool(torch.isfinite(CRITERIA[name](known)).all())


def test_magnitude_is_the_squared_norm():
    assert magnitude(Evidence(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))).tolist() == [25.0, 1.0]


def test_importance_is_the_normalised_mean_of_absolute_gradients():
    gradients = torch.tensor([[3.0, -8.0], [-3.0, 0.0]])  # mean absolute: 3 and 4
    found = importance(Evidence(torch.zeros(2, 1), gradients))
    torch.testing.assert_close(found, torch.tensor([0.6, 0.8]))


def test_the_whole_fisher_information_counts_what_went_before():
    # F = G^T G of one example: a unit adds F_uu + 2 sum F_ur over the units r that went before it.
    gradients = torch.tensor([[1.0, -3.0, 2.0]])
    # First 1 (1); then the third adds 4 + 2 * 2 = 8, the second 9 - 2 * 3 = 3: the second goes;
    # then the third adds 4 + 2 * (2 - 6) = -4, and no score is below an earlier one.
    assert fisher_full(Evidence(torch.zeros(3, 1), gradients)).tolist() == [1.0, 3.0, 3.0]


def test_fisher_is_the_mean_square():
    gradients = torch.tensor([[3.0, -8.0], [-3.0, 0.0]])
    assert fisher(Evidence(torch.zeros(2, 1), gradients)).tolist() == [9.0, 32.0]


def added(information: torch.Tensor, units) -> float:
    at = torch.tensor([*units])
    return float(information[at][:, at].sum())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, UNITS - 1))
def test_no_exchange_improves_what_the_whole_fisher_information_chose(seed, count):
    known = evidence(seed)
    gradients = known.gradients.double()
    information = gradients.T @ gradients / len(gradients)
    greedy = fisher_full(known).argsort(stable=True)[:count]
    found = swap(known, greedy).tolist()
    assert len({*found}) == count
    reached = added(information, found) * (1 - 1e-6)
    assert reached <= added(information, greedy)
    for out, into in itertools.product(found, {*range(UNITS)} - {*found}):
        assert reached <= added(information, {*found} - {out} | {into})


def test_a_swap_leaves_a_greedy_trap():
    # Unit 0 is the cheapest alone, but 1 and 2 undo each other's harm.
    gradients = torch.tensor([[1.0, 2.0, -2.0], [0.0, 0.1, 0.1]])
    known = Evidence(torch.zeros(3, 1), gradients)
    assert fisher_full(known).argsort(stable=True)[0] == 0
    assert swap(known, torch.tensor([0, 1])).tolist() == [1, 2]


def test_activation_is_weight_times_norm():
    inputs = torch.tensor([[3.0, 1.0, 1.0], [4.0, 0.0, 1.0]])  # norms 5 and 1
    known = Evidence(torch.zeros(2, 1), reader=torch.tensor([[1.0, 2.0], [-1.0, 2.0]]),
                     moments=inputs.T @ inputs)  # fmt: skip
    torch.testing.assert_close(activation(known), torch.tensor([10.0, 4.0]) / 116**0.5)


def test_flap_ignores_what_is_constant():
    inputs = torch.tensor([[9.0, 1.0, 1.0], [9.0, -1.0, 1.0]])
    known = Evidence(torch.zeros(2, 1), reader=torch.ones(4, 2), moments=inputs.T @ inputs)
    torch.testing.assert_close(flap(known), torch.tensor([-1.0, 1.0]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_reconstruction_is_the_error_of_the_repaired_output(seed):
    known = evidence(seed)
    gram, weight = known.moments, known.reader.double()
    hessian = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    energy = ((weight @ gram) * weight).sum()
    scores = reconstruction(known)
    for count in range(1, UNITS + 1):
        gone = scores.argsort(stable=True)[:count]
        at = columns(gone.tolist())
        block = hessian.inverse()[at][:, at]
        joint = (weight[:, at] @ block.inverse() * weight[:, at]).sum() / energy
        assert float(scores[gone].max()) == pytest.approx(float(joint), rel=1e-4)


def test_reconstruction_of_many_units_goes_in_chunks():
    torch.manual_seed(0)
    inputs = torch.randn(400, 150).double()
    inputs[:, 7] = 2 * inputs[:, 3] - inputs[:, 4]  # one of the three is free
    inputs = torch.cat([inputs, torch.ones(400, 1).double()], dim=1)
    known = Evidence(torch.zeros(150, 1), reader=torch.randn(9, 151), moments=inputs.T @ inputs)
    scores = reconstruction(known)
    assert set(scores.argsort()[:9].tolist()) & {3, 4, 7}
    assert bool((scores > 0).all())
