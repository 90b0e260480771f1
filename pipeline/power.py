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
from pipeline.budget import Budget, Limits, OfScore
from pipeline.quality import BROKEN, FEWEST

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

    `least` is the number below which not even equal outcomes pass; there are no `rows` of a limit
    for which that is all that can be said.
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
    """Return a plan for every limit that rests on the gate's examples.

    A relative drop is planned at a score of 1; a metric that does not call an example right or
    wrong as if it did, which is the most that its examples can differ by.
    """
    found = _plans("", budget, metric, examples, budget.confidence)
    if budget.regression is not None:
        found += _plans("regression.", budget.regression, metric, examples, budget.confidence)
    return found


def _plans(where: str, limits: Limits, metric: str, examples: int, confidence: float) -> list[Plan]:
    found = []
    for name in ("max_drop", "max_relative_drop"):
        allowed = getattr(limits, name)
        if allowed is not None and METRICS[metric].kind != "perplexity":
            fewest = _least_of_drop(allowed, metric, confidence)
            found.append(_of_drop(where + name, allowed, examples, confidence, fewest))
    if (ratio := limits.max_perplexity_ratio) is not None:
        found.append(_of_perplexity(where + "max_perplexity_ratio", ratio, examples, confidence))
    if (share := limits.max_flips) is not None:
        fewest = _least_of_share(share, confidence)
        found.append(Plan(where + "max_flips", share, examples, confidence, fewest, ()))
    if (share := limits.min_agreement) is not None:
        # Of examples with one decision, or with several: what these are is not known here.
        fewest = min(_least_of_share(1 - share, confidence), _least_of_mean(1 - share, confidence))
        found.append(Plan(where + "min_agreement", share, examples, confidence, fewest, ()))
    if (nats := limits.max_kl) is not None:
        fewest = _least_of_mean(nats / BROKEN, confidence)
        found.append(Plan(where + "max_kl", nats, examples, confidence, fewest, ()))
    return found


def least(limits: OfScore, metric: str, confidence: float) -> int:
    """Return the number of examples below which no score can pass."""
    drops = [d for d in (limits.max_drop, limits.max_relative_drop) if d is not None]
    found = [_least_of_drop(drop, metric, confidence) for drop in drops]
    if (ratio := limits.max_perplexity_ratio) is not None:
        found.append(_least_of_mean(math.log(ratio) / BROKEN, confidence))
    return max(found)


def _of_drop(limit: str, allowed: float, examples: int, confidence: float, fewest: int) -> Plan:
    normal = NormalDist()
    quantiles = normal.inv_cdf(confidence) + normal.inv_cdf(POWER)
    region = exact.accepted(examples, allowed, confidence)
    rows = tuple(
        Row(
            share,
            exact.chance(region, 0.0, share) * (examples >= fewest),
            max(math.ceil(share * (quantiles / allowed) ** 2), fewest),
        )
        for share in FLIPPED
    )
    return Plan(limit, allowed, examples, confidence, fewest, rows)


def _least_of_drop(allowed: float, metric: str, confidence: float) -> int:
    """Return the number of examples below which equal outcomes do not pass.

    At some confidences the exact probability asks for up to four more.
    """
    kind = METRICS[metric].kind
    if kind == "mean":
        return _least_of_mean(allowed, confidence)
    # Where all are equal, Tango's statistic is the root of n d / (1 - d).
    z = NormalDist().inv_cdf(confidence)
    of_statistic = math.floor(z * z * (1 - allowed) / allowed) + 1
    fewest = max(_least_of_share(allowed, confidence), of_statistic)
    return fewest if kind == "binary" else FEWEST


def _least_of_share(allowed: float, confidence: float) -> int:
    """Return the least number of examples of which none shows that fewer than `allowed` are so."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-allowed))


def _least_of_mean(allowed: float, confidence: float) -> int:
    """Return the least number of equal examples with which a mean passes: one more lost 1.

    That has the mean 1 / (n + 1), and the same for its standard error.
    """
    from scipy.special import stdtrit

    n = max(FEWEST, math.floor((1 + NormalDist().inv_cdf(confidence)) / allowed) - 1)
    while (1 + stdtrit(n, confidence)) / (n + 1) >= allowed:
        n += 1
    return n


def _of_perplexity(limit: str, ratio: float, documents: int, confidence: float) -> Plan:
    normal, allowed = NormalDist(), math.log(ratio)
    z, fewest = normal.inv_cdf(confidence), _least_of_mean(allowed / BROKEN, confidence)

    def chance(spread: float, size: int) -> float:
        """Return that of a pass, with the document more that is counted as broken."""
        error = math.hypot(spread, BROKEN / math.sqrt(size)) / math.sqrt(size)
        bound = allowed - BROKEN / size - z * error
        return normal.cdf(bound * math.sqrt(size) / spread) * (size >= fewest)

    def needed(spread: float) -> int:
        low, high = fewest - 1, fewest
        while chance(spread, high) < POWER:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if chance(spread, middle) >= POWER else (middle, high)
        return high

    rows = tuple(Row(spread, chance(spread, documents), needed(spread)) for spread in SPREADS)
    return Plan(limit, ratio, documents, confidence, fewest, rows)
