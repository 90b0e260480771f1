"""What the gate can decide with so many examples, before anything is run.

A model that loses nothing in truth still flips examples, as often back as forth, and the more of
them flip the more examples it takes to show that less than the budget is lost.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

from benchmarks.metrics import METRICS
from pipeline import exact
from pipeline.budget import Budget, Slices
from pipeline.quality import FEWEST

FLIPPED: Final = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of examples that only one of the two models gets right."""
SPREADS: Final = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Standard deviations over the documents of the change of a token's log-likelihood."""
POWER: Final = 0.8
"""The chance of a pass for which the examples are counted."""


@dataclass(frozen=True)
class Row:
    """The chance of a pass, and the examples for `POWER`, where examples differ by so much."""

    differ: float
    chance: float
    needed: int


@dataclass(frozen=True)
class Plan:
    """What a number of examples can decide of one limit, if nothing is lost in truth.

    `least` is the number below which not even equal outcomes pass.
    """

    limit: str
    allowed: float
    examples: int
    confidence: float
    least: int
    rows: tuple[Row, ...]

    @property
    def hopeless(self) -> bool:
        """Whether no outcome at all can pass."""
        return self.examples < self.least


def plans(budget: Budget, metric: str, examples: int) -> list[Plan]:
    """Return a plan for every limit of the score.

    A relative drop is planned at a score of 1; a metric that does not call an example right or
    wrong as if it did, which is the most that its examples can differ by.
    """
    found = []
    for limit in ("max_drop", "max_relative_drop"):
        allowed = getattr(budget, limit)
        if allowed is not None and METRICS[metric].kind != "perplexity":
            found.append(_of_drop(limit, allowed, examples, budget.confidence))
    if (ratio := budget.max_perplexity_ratio) is not None:
        found.append(_of_perplexity(ratio, examples, budget.confidence))
    return found


def least(limits: Slices, confidence: float) -> int:
    """Return the number of examples below which no slice can pass."""
    drops = [d for d in (limits.max_drop, limits.max_relative_drop) if d is not None]
    return max([limits.min_examples, *(_least(drop, confidence) for drop in drops)])


def _of_drop(limit: str, allowed: float, examples: int, confidence: float) -> Plan:
    normal = NormalDist()
    quantiles = normal.inv_cdf(confidence) + normal.inv_cdf(POWER)
    region, fewest = exact.accepted(examples, allowed, confidence), _least(allowed, confidence)
    rows = tuple(
        Row(
            share,
            exact.chance(region, 0.0, share),
            max(math.ceil(share * (quantiles / allowed) ** 2), fewest),
        )
        for share in FLIPPED
    )
    return Plan(limit, allowed, examples, confidence, fewest, rows)


def _least(allowed: float, confidence: float) -> int:
    """Return the least number of examples with which equal outcomes pass."""
    low, high = 0, 1
    while not exact.passes(0, 0, high, allowed, confidence):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        passes = exact.passes(0, 0, middle, allowed, confidence)
        low, high = (low, middle) if passes else (middle, high)
    return high


def _of_perplexity(ratio: float, documents: int, confidence: float) -> Plan:
    normal, allowed = NormalDist(), math.log(ratio)
    z = normal.inv_cdf(confidence)
    quantiles = z + normal.inv_cdf(POWER)
    rows = tuple(
        Row(
            spread,
            normal.cdf(allowed * math.sqrt(documents) / spread - z) * (documents >= FEWEST),
            max(math.ceil((quantiles * spread / allowed) ** 2), FEWEST),
        )
        for spread in SPREADS
    )
    return Plan("max_perplexity_ratio", ratio, documents, confidence, FEWEST, rows)
