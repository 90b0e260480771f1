"""Scores of heads and neurons: one function a criterion, least important lowest.

A criterion sees the evidence on one group of units and returns one score a unit. It knows neither
models nor layers, so that it can be tested in three lines. Scores of different groups are compared
when units are cut over all layers at once; those of a greedy order grow in that order, so that to
cut the lowest is to follow it.

U units, P parameters of a unit, N examples, O outputs of the matrix that reads the units, w of its
inputs for each unit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What is known of a group of units.

    `weights` `(U, P)`: the parameters of each. `gradients` `(N, U)`: the derivative of each
    example's loss by a mask on the unit, at 1; None unless the criterion is in `GRADIENT`.
    `reader` `(O, U w)`, or `(O, U w + 1)` with its bias: the matrix that reads the units. `moments`
    `(U w + 1, U w + 1)`: the sum over tokens of x xT, for its input x with a 1 behind it; None
    unless the criterion is in `MOMENTS`. `generator`: for what is drawn.
    """

    weights: Tensor
    gradients: Tensor | None = None
    reader: Tensor | None = None
    moments: Tensor | None = None
    generator: torch.Generator | None = None


def random(evidence: Evidence) -> Tensor:
    """Return uniform draws `(U,)`: the control of every comparison."""
    return torch.rand(len(evidence.weights), generator=evidence.generator)


def magnitude(evidence: Evidence) -> Tensor:
    """Return the squared norm of each unit's parameters `(U,)`: the baseline of every paper."""
    return evidence.weights.square().sum(1)


def importance(evidence: Evidence) -> Tensor:
    """Return the mean absolute mask gradient, divided by the group's L2 norm `(U,)`.

    Michel, Levy and Neubig 2019, section 2.3, https://arxiv.org/abs/1905.10650
    """
    assert evidence.gradients is not None
    return _unit_norm(evidence.gradients.abs().mean(0))


def fisher(evidence: Evidence) -> Tensor:
    """Return the mean squared mask gradient `(U,)`, the diagonal of the masks' Fisher information.

    Kwon et al. 2022, section 4.1, https://arxiv.org/abs/2204.09656
    """
    assert evidence.gradients is not None
    return evidence.gradients.square().mean(0)


def fisher_full(evidence: Evidence) -> Tensor:
    """Return what each unit adds to the loss when it goes in greedy order `(U,)`.

    With F the group's whole Fisher information, a unit adds F_uu + 2 sum F_ur over the units r that
    went before. `swap` improves the set that is chosen. Kwon et al. 2022, section 4.2.
    """
    information = _information(evidence)
    added = information.diagonal().clone()
    scores, largest = torch.zeros_like(added), torch.zeros(())
    left = torch.ones(len(added), dtype=torch.bool)
    for _ in range(len(added)):
        unit = int(torch.where(left, added, torch.inf).argmin())
        largest = torch.maximum(largest, added[unit])
        scores[unit] = largest
        left[unit] = False
        added += 2 * information[unit]
    return scores


def activation(evidence: Evidence) -> Tensor:
    """Return |W_j|_1 |x_j|_2 over each unit's inputs j, divided by the group's L2 norm `(U,)`.

    Needs no labels. Wanda, https://arxiv.org/abs/2306.11695, summed over a structure as Wanda-sp
    is in https://arxiv.org/abs/2312.11983
    """
    weight, moments = _columns(evidence)
    energy = moments.diagonal()[: weight.shape[1]].clamp_min(0).sqrt()
    return _unit_norm(_each(weight.abs().sum(0) * energy, evidence))


def flap(evidence: Evidence) -> Tensor:
    """Return Var(x_j) |W_j|^2 over each unit's inputs j, standardised in the group `(U,)`.

    Needs no labels. What hardly varies is made up for by a bias. An et al. 2023, FLAP, equations 4
    and 5, https://arxiv.org/abs/2312.11983
    """
    weight, moments = _columns(evidence)
    mean = moments[:-1, -1] / moments[-1, -1]
    variance = (moments.diagonal()[:-1] / moments[-1, -1] - mean.square()).clamp_min(0)
    scores = _each(variance * weight.square().sum(0), evidence)
    deviation = scores.std(correction=0).clamp_min(1e-30)
    return (scores - scores.mean()) / deviation


STEPS: Final = 64
"""A greedy order takes so many steps at most; of more units, several go in one."""
RIDGE: Final = 1e-2
"""As a fraction of the mean of the diagonal of the second moments."""


def reconstruction(evidence: Evidence) -> Tensor:
    """Return the relative error of the reader's output once each unit is gone `(U,)`.

    Units go in greedy order, and the reader is repaired after each: optimal brain surgery on
    groups. With H the second moments plus a ridge, to remove the columns P costs
    tr(W_P (H^-1_PP)^-1 W_P^T). The score is the sum of the costs so far, over |X W^T|^2. Needs no
    labels. Time: O((U w)^3).
    ZipLM, section 3.1, https://arxiv.org/abs/2302.04089
    """
    assert evidence.reader is not None
    assert evidence.moments is not None
    weight = evidence.reader.double().clone()
    size, count = weight.shape[1], len(evidence.weights)
    width = (len(evidence.moments) - 1) // count
    gram = evidence.moments[:size, :size].double()
    energy = ((weight @ gram) * weight).sum().clamp_min(1e-30)
    ridge = (RIDGE * gram.diagonal().mean()).clamp_min(1e-12)
    hessian = gram + ridge * torch.eye(size, dtype=gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    columns = torch.arange(count * width).reshape(count, width)
    left, spent = torch.arange(count), energy.new_zeros(())
    scores = weight.new_zeros(count)
    while len(left):
        at = columns[left]
        blocks = inverse[at[:, :, None], at[:, None, :]]
        each = weight[:, at].permute(1, 2, 0)  # (units, w, O)
        costs = (each * torch.linalg.solve(blocks, each)).sum((1, 2))
        chosen = costs.argsort(stable=True)[: -(-count // STEPS)]
        sums = spent + costs[chosen].clamp_min(0).cumsum(0)
        scores[left[chosen]], spent = sums / energy, sums[-1]
        gone = columns[left[chosen]].flatten()
        update = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weight -= weight[:, gone] @ update
        inverse -= inverse[:, gone] @ update
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[chosen] = False
        left = left[stays]
    return scores.float()


def swap(evidence: Evidence, removed: Tensor) -> Tensor:
    """Return a set of as many units that adds less to the loss, one exchange after the other.

    The set R adds sum F_ab over a, b in R; the best exchange of a removed unit for a kept one is
    done until none lowers it. Kwon et al. 2022, section 4.2.
    """
    information = _information(evidence)
    gone = torch.zeros(len(information), dtype=torch.bool)
    gone[removed] = True
    while True:
        back, away = gone.nonzero()[:, 0], (~gone).nonzero()[:, 0]
        if not len(back) or not len(away):
            break
        coupled = information[:, gone].sum(1)
        diagonal = information.diagonal()
        change = (diagonal + 2 * coupled)[away] + (diagonal - 2 * coupled)[back][:, None]
        change = change - 2 * information[back][:, away]
        best = int(change.argmin())
        total = information[gone][:, gone].sum()
        if float(change.flatten()[best]) >= -1e-9 * float(total):
            break
        gone[back[best // len(away)]] = False
        gone[away[best % len(away)]] = True
    return gone.nonzero()[:, 0]


def _information(evidence: Evidence) -> Tensor:
    """Return the Fisher information of the units' masks `(U, U)`, in float64."""
    assert evidence.gradients is not None
    gradients = evidence.gradients.double()
    return gradients.T @ gradients / len(gradients)


def _columns(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Return the reader without its bias `(O, U w)`, and the moments, in float64."""
    assert evidence.reader is not None
    assert evidence.moments is not None
    moments = evidence.moments.double()
    return evidence.reader.double()[:, : len(moments) - 1], moments


def _each(columns: Tensor, evidence: Evidence) -> Tensor:
    """Return the sums over each unit's columns `(U,)`."""
    return columns.reshape(len(evidence.weights), -1).sum(1).float()


def _unit_norm(scores: Tensor) -> Tensor:
    return scores / scores.norm().clamp_min(1e-30)


CRITERIA: Final[Mapping[str, Callable[[Evidence], Tensor]]] = {
    "activation": activation,
    "fisher": fisher,
    "fisher-full": fisher_full,
    "flap": flap,
    "importance": importance,
    "magnitude": magnitude,
    "random": random,
    "reconstruction": reconstruction,
}
GRADIENT: Final = frozenset({"fisher", "fisher-full", "importance"})
"""The criteria that need gradients, hence labelled calibration data."""
MOMENTS: Final = frozenset({"activation", "flap", "reconstruction"})
"""The criteria that need second moments, hence calibration data."""
SWAPS: Final[Mapping[str, Callable[[Evidence, Tensor], Tensor]]] = {"fisher-full": swap}
"""What improves the set of units that a criterion's scores have chosen."""
