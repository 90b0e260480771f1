"""How probable an outcome of the gate is: summed over all outcomes, not approximated.

With n examples, b that the candidate alone gets wrong and c that it alone gets right, the gate
passes for the same c every b up to a largest one. Given c, b is binomial; so a probability is one
sum over c, and takes milliseconds.

N examples, c in [0, N].
"""

import math
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.intervals import binomial, log_factorials, tango

REACH: Final = 9.0
"""Standard deviations of c beyond which nothing is summed."""
NUISANCES: Final = 128
"""Shares of discordant examples at which a probability is taken, where the largest one counts."""
STEPS: Final = 18
"""Halvings of the interval in which the limit of the statistic lies."""
EQUAL: Final = 1e-9
"""Statistics that are closer than this are equal."""

Region = NDArray[np.int64]


def accepted(examples: int, allowed: float, confidence: float) -> Region:
    """Return for every c the largest b `(N + 1,)` with which `passes` is true, -1 for none."""
    low = NormalDist().inv_cdf(confidence)
    high = low + 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        small = worst(above(examples, allowed, middle), allowed) <= 1 - confidence
        low, high = (low, middle) if small else (middle, high)
    return above(examples, allowed, high)


def passes(wrong: int, mended: int, examples: int, allowed: float, confidence: float) -> bool:
    """Return whether the outcome proves that less than `allowed` of the accuracy is lost.

    Tango's test has to say so, and an outcome as good by his statistic has to be rarer than
    1 - `confidence` whatever the share of discordant examples, summed exactly: his statistic is
    normal for many discordant examples alone, and passes one of fifteen bad models where none is
    seen (after Hsueh, Liu and Chen 2001, Biometrics 57:478-483).
    """
    statistic = float(tango(wrong, mended, examples, -allowed))
    if not statistic > NormalDist().inv_cdf(confidence):
        return False
    as_good = above(examples, allowed, statistic - EQUAL)
    return worst(as_good, allowed) <= 1 - confidence


def above(examples: int, allowed: float, statistic: float) -> Region:
    """Return for every c the largest b for which Tango's statistic is more than `statistic`."""
    c = np.arange(examples + 1)
    mended = c.astype(np.float64)
    low, high = np.full(examples + 1, -1), examples - c  # the answer lies in [low, high]
    while np.any(low < high):
        middle = (low + high + 1) // 2
        above = tango(middle.astype(np.float64), mended, examples, -allowed) > statistic
        low, high = np.where(above, middle, low), np.where(above, high, middle - 1)
    return low


def chance(region: Region, drop: float, discordant: float) -> float:
    """Return the probability of the outcomes in `region`.

    Args:
        region: for every c the largest b, which grows with c.
        drop: the true drop of accuracy.
        discordant: the true share of examples that only one of the two gets right, at least `drop`.
    """
    examples = len(region) - 1
    lost, won = (discordant + drop) / 2, max((discordant - drop) / 2, 0.0)
    logs = log_factorials(examples)
    mean, reach = examples * won, REACH * math.sqrt(examples * won * (1 - won)) + REACH
    c = np.arange(max(0, math.floor(mean - reach)), min(examples, math.ceil(mean + reach)) + 1)
    c = c[region[c] >= 0]
    if not len(c):
        return 0.0
    share, left = min(lost / (1 - won), 1.0), examples - c
    most = np.maximum.accumulate(region[c])  # it falls only where it is all that is left
    # From one c to the next, b <= most becomes likelier since one example fewer can be lost, and by
    # every b that is added.
    added = np.diff(most)
    at = np.repeat(np.arange(1, len(c)), added)
    b = np.arange(most[0], most[-1]) + 1
    growth = np.zeros(len(c))
    growth[0] = binomial(np.arange(most[0] + 1), left[0], share, logs).sum()
    growth[1:] = share * binomial(most[:-1], left[1:], share, logs)
    np.add.at(growth, at, binomial(b, left[at], share, logs))
    return float(binomial(c, np.asarray(examples), won, logs) @ np.cumsum(growth))


def worst(region: Region, drop: float) -> float:
    """Return the largest probability of `region` over all shares of discordant examples."""
    return max(chance(region, drop, share) for share in np.geomspace(drop, 1.0, NUISANCES))
