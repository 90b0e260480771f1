"""The algebra of the repair, against the closed forms it must equal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.calibration import Moments
from pipeline.compensation import error, repair, shift, solve


def problem(seed: int, inputs: int = 12, samples: int = 300) -> tuple[torch.Tensor, ...]:
    """Return correlated inputs (N, I), a weight (O, I) and kept columns, in float64."""
    torch.manual_seed(seed)
    mixing = torch.randn(inputs, inputs, dtype=torch.float64)
    x = torch.randn(samples, inputs, dtype=torch.float64) @ mixing
    weight = torch.randn(5, inputs, dtype=torch.float64)
    return x, weight, torch.randperm(inputs)[: inputs // 2].sort().values


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), ridge=st.sampled_from([1e-3, 1e-1, 1.0]))
def test_solve_is_ridge_regression_towards_the_old_weight(seed, ridge):
    x, weight, kept = problem(seed)
    gram = x.T @ x
    penalty = ridge * gram.diagonal().mean()
    # Stack sqrt(penalty) I under X: ordinary least squares of the shifted problem.
    left = torch.cat([x[:, kept], penalty.sqrt() * torch.eye(len(kept), dtype=x.dtype)])
    right = torch.cat([x @ weight.T, penalty.sqrt() * weight[:, kept].T])
    expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(solve(weight, gram, kept, ridge), expected, rtol=1e-6, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_solve_is_the_inverse_hessian_update(seed):
    x, weight, kept = problem(seed)
    hessian = x.T @ x
    hessian += 1e-2 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=x.dtype)
    removed = torch.tensor([i for i in range(len(hessian)) if i not in set(kept.tolist())])
    inverse = hessian.inverse()
    block = inverse[removed][:, removed].inverse()
    obs = weight - weight[:, removed] @ block @ inverse[removed]
    torch.testing.assert_close(solve(weight, x.T @ x, kept, 1e-2), obs[:, kept])
    assert obs[:, removed].abs().max() < 1e-8


def test_error_is_the_measured_one():
    x, weight, kept = problem(1)
    repaired = solve(weight, x.T @ x, kept, 1e-2)
    measured = (x @ weight.T - x[:, kept] @ repaired.T).square().sum()
    assert error(weight, x.T @ x, kept, repaired) == pytest.approx(float(measured))


def test_a_column_that_others_make_up_is_free():
    x, weight, _ = problem(2)
    x[:, 0] = 2 * x[:, 3] - x[:, 4]
    gram = x.T @ x
    found = repair(weight, Moments(gram, gram), torch.arange(1, 12))
    assert found.error_after < 1e-5 * found.error_before


def test_a_repair_that_does_not_hold_on_other_data_is_not_kept():
    fit, weight, kept = problem(3)
    torch.manual_seed(4)
    other = torch.randn(300, 12, dtype=torch.float64)  # uncorrelated: nothing makes up for anything
    found = repair(weight, Moments(fit.T @ fit, other.T @ other), kept)
    assert found.error_after <= found.error_before
    assert torch.equal(found.weight, weight[:, kept])


def test_dead_columns_do_not_break_it():
    x, weight, kept = problem(5)
    x[:, kept[0]] = 0
    x[:, kept[1]] = x[:, kept[2]]
    assert torch.isfinite(solve(weight, x.T @ x, kept, 0.0)).all()


def test_a_shift_gives_the_bias_what_the_removed_columns_gave_on_average():
    x, weight, kept = problem(6)
    x += 3
    x[:, -1] = 1  # the bias
    kept = torch.cat([kept[kept != 11], torch.tensor([11])])
    gram = x.T @ x
    found = shift(weight, Moments(gram, gram), kept)
    torch.testing.assert_close((x[:, kept] @ found.weight.T).mean(0), (x @ weight.T).mean(0))
    assert torch.equal(found.weight[:, :-1], weight[:, kept][:, :-1])
    assert found.error_after == pytest.approx(error(weight, gram, kept, found.weight))
    assert found.error_after < found.error_before
