"""Least-squares repair of the matrix that reads units, after some of them were cut.

The columns that stay take over, as well as the data allow, what the removed ones gave:

    W' = argmin |X W^T - X_K W'^T|^2 + ridge |W' - W_K|^2
       = W_K + W_P G_PK (G_KK + ridge I)^-1,      G = X^T X

with P the removed and K the kept columns. The ridge draws towards the weights as they were, not
towards zero. A bias is one more column of ones that is never removed. Source: ridge regression;
the same by the inverse Hessian is OBS on groups, https://arxiv.org/abs/2302.04089

Cost: one Cholesky factorisation of K x K a candidate ridge, O(K^3 + O K^2).

O outputs, I inputs (with the column of ones, if any), K kept, P removed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pipeline.calibration import Moments

RIDGES: Final = (1e-3, 1e-2, 1e-1, 1.0)
"""Candidates, as fractions of the mean of the diagonal of G."""


@dataclass(frozen=True)
class Repair:
    """The repaired weight `(O, K)`, and the squared error on held-out data with and without it."""

    weight: Tensor
    error_before: float
    error_after: float


def solve(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Return the weight of the kept columns that best replaces all of them `(O, K)`.

    `weight` is `(O, I)`, `gram` `(I, I)`, both float64; `ridge` is a fraction of mean(diag(gram)).
    """
    removed = _others(kept, len(gram))
    penalty = ridge * gram.diagonal().mean()
    within = gram[kept][:, kept] + penalty * torch.eye(len(kept), dtype=gram.dtype)
    across = gram[removed][:, kept]
    factor, failed = torch.linalg.cholesky_ex(within)
    while failed:
        # Dead or dependent columns and a tiny ridge: a larger one always ends this.
        penalty = 10 * penalty.clamp_min(1e-12)
        within.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(within)
    return weight[:, kept] + weight[:, removed] @ torch.cholesky_solve(across.T, factor).T


def shift(weight: Tensor, moments: Moments, kept: Tensor) -> Repair:
    """Return the kept columns with the removed ones' mean output added to the bias, if that helps.

    `weight` `(O, I)` carries the bias as its last column, so that the last row of the moments holds
    the sums of the inputs. Source: FLAP, section 3.4, https://arxiv.org/abs/2312.11983
    """
    weight = weight.double()
    before = error(weight, moments.held_out, kept, weight[:, kept])
    removed = _others(kept, weight.shape[1])
    mean = moments.fit[-1, removed] / moments.fit[-1, -1]
    candidate = weight[:, kept].clone()
    candidate[:, -1] += weight[:, removed] @ mean
    after = error(weight, moments.held_out, kept, candidate)
    if after < before:
        return Repair(candidate, before, after)
    return Repair(weight[:, kept], before, before)


def error(weight: Tensor, gram: Tensor, kept: Tensor, repaired: Tensor) -> float:
    """Return |X W^T - X_K W'^T|^2, from the second moments alone."""
    difference = weight.clone()
    difference[:, kept] -= repaired
    return float(((difference @ gram) * difference).sum())


def repair(weight: Tensor, moments: Moments, kept: Tensor) -> Repair:
    """Return the repair with the ridge that is best on held-out data, or none if none helps.

    `weight` `(O, I)` carries the bias as its last column if the moments do.
    """
    weight = weight.double()
    unrepaired = weight[:, kept]
    before = error(weight, moments.held_out, kept, unrepaired)
    best = Repair(unrepaired, before, before)
    for ridge in RIDGES:
        candidate = solve(weight, moments.fit, kept, ridge)
        after = error(weight, moments.held_out, kept, candidate)
        if after < best.error_after:
            best = Repair(candidate, before, after)
    return best


def _others(kept: Tensor, size: int) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[kept] = False
    return mask.nonzero()[:, 0]


REPAIRS: Final[Mapping[str, Callable[[Tensor, Moments, Tensor], Repair]]] = {
    "bias": shift,
    "least-squares": repair,
}
