"""Bounds of a drop, a mean and a share, each of them one-sided at the asked confidence.

Where an example counts for one at most, a handful of examples that differ, or none, says little of
the rare ones that would; there the bounds that rest on large numbers are widened by one example
more than was seen.

N examples.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

HALVINGS: Final = 50
"""Of the interval in which a bound lies."""
RESAMPLES: Final = 1_999
"""Of a bootstrap; one seed, so that a verdict can be reproduced."""


def tango(
    wrong: float | Floats, mended: float | Floats, examples: float, difference: float
) -> Floats:
    """Return Tango's score statistic for H0: candidate - baseline = `difference`.

    Args:
        wrong: examples that only the baseline gets right (b).
        mended: examples that only the candidate gets right (c).
        examples: all of them (n).
        difference: of the two accuracies, in (-1, 1).

    Tango 1998, Statistics in Medicine 17:891-908.
    """
    wrong, mended = np.asarray(wrong, np.float64), np.asarray(mended, np.float64)
    a = 2 * examples
    b = -(wrong + mended) + (2 * examples - mended + wrong) * difference
    c = -wrong * difference * (1 - difference)
    q = (np.sqrt(np.maximum(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = examples * (2 * q + difference * (1 - difference))
    shift = mended - wrong - examples * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        found = shift / np.sqrt(np.maximum(variance, 0.0))
    return np.where(shift == 0, 0.0, found)


def tango_interval(
    wrong: float, mended: float, examples: float, confidence: float
) -> tuple[float, float]:
    """Return the bounds of candidate - baseline."""
    z = NormalDist().inv_cdf(confidence)
    edge = 1 - 1e-9

    def bound(sign: int) -> float:
        inside, outside = (mended - wrong) / examples, sign * edge
        if sign * tango(wrong, mended, examples, outside) + z > 0:
            return float(sign)
        # The statistic falls from the estimate to the end. By hand: scipy.optimize takes 0.7 s to
        # import, more than all the rest of a judgement.
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            if sign * tango(wrong, mended, examples, middle) + z > 0:
                inside = middle
            else:
                outside = middle
        return (inside + outside) / 2

    return bound(-1), bound(1)


def mean_interval(values: Floats, confidence: float, *, most: float = 0.0) -> tuple[float, float]:
    """Return the bounds of the mean of paired differences `(N,)` (Student's t).

    Args:
        values: the differences.
        confidence: of each bound.
        most: what one example can come to; the upper bound counts one more that lost so much, the
            lower one that gained it.
    """
    from scipy.special import stdtrit  # not scipy.stats, which takes half a second to import

    def end(sign: int) -> float:
        counted = np.append(values, sign * most) if most else values
        half = stdtrit(len(counted) - 1, confidence) * counted.std(ddof=1) / math.sqrt(len(counted))
        return float(counted.mean() + sign * half)

    return end(-1), end(1)


def share_interval(count: int, examples: int, confidence: float) -> tuple[float, float]:
    """Return the exact bounds of a share (Clopper and Pearson 1934, Biometrika 26:404-413)."""
    logs = log_factorials(examples)

    def below(seen: int) -> float:
        """Return the share at which `seen` or fewer have the probability 1 - confidence."""
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            few = binomial(np.arange(seen + 1), np.asarray(examples), middle, logs).sum()
            low, high = (middle, high) if few > 1 - confidence else (low, middle)
        return (low + high) / 2

    high = below(count) if count < examples else 1.0
    return 1 - below(examples - count) if count else 0.0, high


@lru_cache(maxsize=4)
def log_factorials(largest: int) -> Floats:
    """Return log k! for k from 0 to `largest`."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, largest + 1)))])


def binomial(
    count: NDArray[np.int64], examples: NDArray[np.int64], share: float, logs: Floats
) -> Floats:
    """Return the probability of `count` of `examples`, where 0 <= share <= 1.

    By hand, as `log_factorials`, for scipy.special takes longer to import than a judgement.
    """
    rest = examples - count
    possible = rest >= 0
    rest = np.maximum(rest, 0)
    ways = logs[examples] - logs[np.minimum(count, examples)] - logs[rest]
    with np.errstate(divide="ignore", invalid="ignore"):
        one = np.where(count > 0, count * np.log(share), 0.0)
        other = np.where(rest > 0, rest * np.log1p(-share), 0.0)
    return np.where(possible, np.exp(ways + one + other), 0.0)


def bootstrap_interval(
    drop: Callable[[NDArray[np.int64]], float],
    examples: int,
    confidence: float,
    *,
    lost: Sequence[float],
    won: Sequence[float],
) -> tuple[float, float]:
    """Return percentile bounds of `drop(places)` over resampled places of examples.

    A resample holds the one example more that was lost, or won, as often as any other: a number of
    times that is Poisson with mean 1.

    Args:
        drop: of the examples at `places`.
        examples: how many there are.
        confidence: of each bound.
        lost: what 0, 1, 2, ... examples more add to the drop, at most; further ones add nothing.
        won: what they take from it.
    """
    generator = np.random.default_rng(0)
    drops = np.asarray([drop(generator.integers(0, examples, examples)) for _ in range(RESAMPLES)])
    more = generator.poisson(1.0, RESAMPLES)
    added, taken = (np.asarray(costs)[np.minimum(more, len(costs) - 1)] for costs in (lost, won))
    low = float(np.quantile(drops - taken, 1 - confidence))
    return low, float(np.quantile(drops + added, confidence))
