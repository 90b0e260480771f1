"""How much of each group goes, so that the whole costs no more than a budget.

A multiple-choice knapsack: every group has levels with a cost and an error each, one level is
chosen of every group, and the errors' sum is least. The errors of different layers weigh
differently in the loss of the model; a short search over their weights makes up for that. ZipLM,
section 3.2, https://arxiv.org/abs/2302.04089; the search: SPDY, https://arxiv.org/abs/2201.13096

Cost: O(groups x levels x buckets) an allocation. G groups, L levels of a group.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BUCKETS: Final = 10_000
"""The budget is counted in so many parts; costs are rounded up."""
CHANGED: Final = 0.2
"""The share of the weights that a step of the search changes."""
SPREAD: Final = 0.7
"""The standard deviation of the change, of the logarithm."""


def allocate(
    costs: Sequence[Floats], errors: Sequence[Floats], budget: float
) -> tuple[int, ...] | None:
    """Return the level of each group with the least sum of errors, or None if none is in budget.

    `costs` and `errors` hold an array `(L,)` for each of the groups; costs are not negative.
    """
    if budget < 0:
        return None
    unit = max(budget / BUCKETS, 1e-12)
    least = np.zeros(BUCKETS + 1)  # by what may be spent
    chosen = np.zeros((len(costs), BUCKETS + 1), np.int32)
    parts = [np.minimum(np.ceil(cost / unit - 1e-9), BUCKETS + 1).astype(int) for cost in costs]
    for group, error in enumerate(errors):
        options = np.full((len(error), BUCKETS + 1), np.inf)
        for level, part in enumerate(parts[group]):
            if part <= BUCKETS:
                options[level, part:] = least[: BUCKETS + 1 - part] + error[level]
        chosen[group] = options.argmin(0)
        least = options.min(0)
    if not np.isfinite(least[-1]):
        return None
    left, levels = BUCKETS, list[int]()
    for group in reversed(range(len(costs))):
        levels.append(int(chosen[group, left]))
        left -= parts[group][levels[-1]]
    return tuple(reversed(levels))


def search(
    costs: Sequence[Floats],
    errors: Sequence[Floats],
    budget: float,
    loss: Callable[[tuple[int, ...]], float],
    *,
    steps: Iterable[int],
    seed: int = 0,
) -> tuple[int, ...] | None:
    """Return the levels with the least `loss` among those that changed weights of the errors give.

    The weights that did best so far are changed at random in each of the steps.
    """
    generator = np.random.default_rng(seed)
    weights = np.ones(len(costs))
    best = allocate(costs, errors, budget)
    if best is None:
        return None
    known = {best: loss(best)}
    for _ in steps:
        change = generator.normal(0, SPREAD, len(costs)) * (generator.random(len(costs)) < CHANGED)
        tried = weights * np.exp(change)
        weighted = [weight * error for weight, error in zip(tried, errors, strict=True)]
        levels = allocate(costs, weighted, budget)
        assert levels is not None  # what is in the budget does not depend on the errors
        if levels not in known:
            known[levels] = loss(levels)
        if known[levels] < known[best]:
            best, weights = levels, tried
    return best
