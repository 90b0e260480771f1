"""Scores of heads and neurons: one function a criterion, least important lowest.

A criterion sees the evidence on one group of units and returns one score a unit. It knows neither
models nor layers, so that it can be tested in three lines.

U units, P parameters of a unit, N examples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What is known of a group of units.

    `weights` `(U, P)`: the parameters of each. `gradients` `(N, U)`: the derivative of each
    example's loss by a mask on the unit, at 1; None unless the criterion is in `GRADIENT`.
    """

    weights: Tensor
    gradients: Tensor | None = None


def magnitude(evidence: Evidence) -> Tensor:
    """Return the squared norm of each unit's parameters `(U,)`: the baseline of every paper."""
    return evidence.weights.square().sum(1)


def importance(evidence: Evidence) -> Tensor:
    """Return the mean absolute mask gradient, divided by the group's L2 norm `(U,)`.

    Michel, Levy and Neubig 2019, section 2.3, https://arxiv.org/abs/1905.10650
    """
    assert evidence.gradients is not None
    scores = evidence.gradients.abs().mean(0)
    return scores / scores.norm().clamp_min(1e-30)


CRITERIA: Final[Mapping[str, Callable[[Evidence], Tensor]]] = {
    "importance": importance,
    "magnitude": magnitude,
}
GRADIENT: Final = frozenset({"importance"})
"""The criteria that need gradients, hence calibration data."""
