"""The checks of quality: what the gate's examples say of baseline and candidate.

Each gives the bounds of what was lost, an outcome, and where it is open the number of further
examples that would decide. Which test it is follows from the kind of metric (methods: Tango's
score test for right and wrong, Student's t for means and for documents as clusters, a paired
bootstrap for metrics of a whole set, exact binomial bounds for shares).

N examples.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.metrics import METRICS, Columns, Metric, score
from pipeline import exact
from pipeline.budget import Limits, Slices
from pipeline.evidence import Evidence, EvidenceError, check_columns, divergence
from pipeline.intervals import (
    Floats,
    bootstrap_interval,
    mean_interval,
    share_interval,
    tango,
    tango_interval,
)
from pipeline.report import Check, Outcome

FEWEST: Final = 30
"""Examples below which an interval that rests on large numbers is not trusted."""
EXACTLY: Final = 0.1
"""What the exact test asks of Tango's statistic beyond its normal quantile, at most."""
BROKEN: Final = 1.0
"""What one document more than was seen is taken to lose, in nats a token or decision: more than any
bound by the data, of which a few dozen may all be sound where one of fifty is broken."""
MOST_LOST: Final = 6
"""Examples that a bootstrap adds at most; a Poisson count with mean 1 is larger once in 12,000."""
FURTHEST: Final = 1_000
"""So many times the examples are too many to ask for."""


def check_scores(
    limits: Limits | Slices,
    metric: str,
    baseline: Columns,
    candidate: Columns,
    confidence: float,
) -> Iterator[Check]:
    """Yield the checks of the limits that are of the metric's kind.

    Raises:
        EvidenceError: a limit is of another kind, or the columns are not fit.
    """
    names = ("max_drop", "max_relative_drop", "max_perplexity_ratio")
    fitting = names[2:] if METRICS[metric].kind == "perplexity" else names[:2]
    for name in names:
        allowed = getattr(limits, name)
        if allowed is not None and name not in fitting:
            expected = " or ".join(fitting)
            raise EvidenceError(f"budget: found {name}, expected {expected}, the limit of {metric}")
        if allowed is not None:
            yield check_score(
                metric,
                baseline,
                candidate,
                allowed=allowed,
                confidence=confidence,
                relative=name == "max_relative_drop",
            )


def check_score(
    metric_name: str,
    baseline: Columns,
    candidate: Columns,
    *,
    allowed: float,
    confidence: float,
    relative: bool = False,
) -> Check:
    """Return the check of the score: the drop, or for perplexity the ratio, against `allowed`.

    A relative drop r of right and wrong answers is judged as the drop that it comes to at the
    baseline's score. That errs on the safe side: of candidate - (1 - r) baseline the variance is
    (1 - r) times the share of discordant examples at most (Nam and Blackwelder 2002, Statistics in
    Medicine 21:689-699). Of other scores it is the contrast (1 - r) baseline - candidate itself.

    Args:
        metric_name: a key of `METRICS`.
        baseline: the baseline's columns, one row an example.
        candidate: the candidate's, the same examples in the same order.
        allowed: the largest drop, or the largest ratio of perplexities.
        confidence: of the one-sided test, for pass and for fail alike.
        relative: whether `allowed` is a share of the baseline's score.

    Raises:
        EvidenceError: the columns do not match, are empty, or hold NaN.
    """
    metric = METRICS[metric_name]
    check_columns(baseline, candidate)
    size = len(next(iter(baseline.values())))
    if metric.kind == "perplexity":
        return _trusted(_check_perplexity(baseline, candidate, allowed, confidence), size)
    before = score(metric_name, baseline)
    scale = before if relative else 1.0
    if not scale > 0:
        raise EvidenceError(f"{metric_name}: found {before} for the baseline, expected more than 0")
    estimate = before - score(metric_name, candidate)
    limit = allowed * scale
    if metric.kind == "binary":
        low, high, outcome, note = _binary(metric, baseline, candidate, limit, confidence)
    else:
        kept = 1 - allowed if relative else 1.0
        if metric.kind == "mean":
            first, last = (np.asarray(metric.function(c)) for c in (baseline, candidate))
            low, high = mean_interval(kept * first - last, confidence, most=1.0)
        else:
            low, high = _resampled(metric, baseline, candidate, kept, confidence)
        low, high = (bound + (1 - kept) * before for bound in (low, high))
        outcome = _against(low, high, limit)
        note = _more_examples(size, low, high, estimate, limit) if _open(outcome) else ""
    what = f"{'relative ' * relative}{metric_name} drop"
    low, high = low / scale, high / scale
    check = Check(what, allowed, estimate / scale, low, high, outcome, note)
    return check if metric.kind == "binary" else _trusted(check, size)


def _binary(
    metric: Metric, baseline: Columns, candidate: Columns, allowed: float, confidence: float
) -> tuple[float, float, Outcome, str]:
    """Return bounds of the drop, the outcome, and what is said of it."""
    before, after = (np.asarray(metric.function(c), bool) for c in (baseline, candidate))
    wrong, mended, size = int((before & ~after).sum()), int((~before & after).sum()), len(before)
    lower, upper = tango_interval(wrong, mended, size, confidence)
    low, high = -upper, -lower
    outcome = _against(low, high, allowed)
    if outcome == "pass" and not exact.passes(wrong, mended, size, allowed, confidence):
        outcome = "inconclusive"
    if not _open(outcome):
        return low, high, outcome, ""
    # The statistic grows with the root of the number of examples.
    found = abs(float(tango(wrong, mended, size, -allowed)))
    needed = NormalDist().inv_cdf(confidence) + EXACTLY
    return low, high, outcome, _needs(size, (needed / found) ** 2 if found else math.inf)


def _resampled(
    metric: Metric, baseline: Columns, candidate: Columns, kept: float, confidence: float
) -> tuple[float, float]:
    """Return percentile bounds of `kept` times the baseline's score less the candidate's."""

    def drop(places: NDArray[np.int64]) -> float:
        before, after = (
            float(np.mean(metric.function({name: v[places] for name, v in columns.items()})))
            for columns in (baseline, candidate)
        )
        return kept * before - after

    won, lost = (_costs(metric, columns) for columns in (baseline, candidate))
    size = len(next(iter(baseline.values())))
    return bootstrap_interval(drop, size, confidence, lost=lost, won=won)


def _costs(metric: Metric, columns: Columns) -> list[float]:
    """Return what 0, 1, ... `MOST_LOST` examples turned wrong take from the score, at most.

    An example of a rare class costs a macro F1 far more than one of N.
    """
    assert metric.spoil  # of every corpus metric
    score = float(np.mean(metric.function(columns)))
    costs = [
        max(score - float(np.mean(metric.function(spoilt))) for spoilt in metric.spoil(columns, n))
        for n in range(1, MOST_LOST + 1)
    ]
    return np.maximum.accumulate([0.0, *costs]).tolist()


def _check_perplexity(
    baseline: Columns, candidate: Columns, allowed: float, confidence: float
) -> Check:
    """Judge the ratio of perplexities: the mean difference of log-likelihoods a token.

    An example is a document; the ratio estimator's residuals are taken by document, since tokens
    of a document are not independent (Cochran 1977, Sampling Techniques, section 6).
    """
    tokens = np.asarray(baseline["tokens"], np.float64)
    if not np.all(tokens >= 0) or not tokens.sum() > 0:
        raise EvidenceError("perplexity: found no tokens, or less, expected some")
    difference = np.asarray(candidate["nll"] - baseline["nll"], np.float64)
    mean = float(difference.sum() / tokens.sum())
    low, high = _nats_interval(difference, tokens, mean, confidence)
    estimate, low, high = (math.exp(x) for x in (mean, low, high))
    outcome, note = _against(low, high, allowed), ""
    if _open(outcome):
        logs = [math.log(x) for x in (low, high, estimate, allowed)]
        note = _more_examples(len(tokens), *logs)
    return Check("perplexity ratio", allowed, estimate, low, high, outcome, note)


def _nats_interval(
    nats: Floats, sizes: Floats, mean: float, confidence: float
) -> tuple[float, float]:
    """Return the bounds of a mean of nats: one example more may have lost `BROKEN`, not won it."""
    low, _ = _ratio_interval(nats, sizes, mean, confidence, most=0.0)
    _, high = _ratio_interval(nats, sizes, mean, confidence, most=BROKEN)
    return low, high


def _ratio_interval(
    sums: Floats, sizes: Floats, ratio: float, confidence: float, *, most: float
) -> tuple[float, float]:
    """Return the bounds of `ratio`, the quotient of the totals of two columns `(N,)`.

    One example more, of average size, is counted to come to `most`, or to the most that was seen.
    """
    if len(sums) == 1:
        return ratio, ratio  # one example is never trusted
    residuals = (sums - ratio * sizes) / sizes.mean()
    low, high = mean_interval(residuals, confidence, most=max(most, np.abs(residuals).max()))
    return ratio + low, ratio + high


def check_flips(evidence: Evidence, allowed: float, confidence: float) -> Check:
    """Return the check of the share of examples that turned from right to wrong or back.

    Raises:
        EvidenceError: the metric calls no example right or wrong.
    """
    metric = METRICS[evidence.metric]
    if metric.kind != "binary":
        raise EvidenceError(
            f"budget: found max_flips, expected no such limit with {evidence.metric}, which does"
            " not call an example right or wrong"
        )
    before, after = (
        np.asarray(metric.function(o.columns), bool)
        for o in (evidence.baseline, evidence.candidate)
    )
    return _check_share("flips", int((before != after).sum()), len(before), allowed, confidence)


def check_agreement(evidence: Evidence, least: float, confidence: float) -> Check:
    """Return the check of the share of equal decisions, with the examples as clusters.

    Raises:
        EvidenceError: there is no decision, or those of the two sides do not match.
    """
    sizes, differ, _ = divergence(evidence)
    allowed = 1 - least
    if np.all(sizes == 1):
        check = _check_share("", int(differ.sum()), len(sizes), allowed, confidence)
    elif not sizes.sum():
        raise EvidenceError("agreement: found no decisions, expected some")
    else:
        share = float(differ.sum() / sizes.sum())
        low, high = _ratio_interval(differ, sizes, share, confidence, most=1.0)
        outcome, note = _against(low, high, allowed), ""
        if _open(outcome):
            note = _more_examples(len(sizes), low, high, share, allowed)
        check = _trusted(Check("", allowed, share, low, high, outcome, note), len(sizes))
    return replace(
        check,
        what="agreement",
        allowed=least,
        estimate=1 - check.estimate,
        low=1 - check.high,
        high=1 - check.low,
        at_least=True,
    )


def check_kl(evidence: Evidence, allowed: float, confidence: float) -> Check:
    """Return the check of the mean divergence of a decision, with the examples as clusters.

    Raises:
        EvidenceError: there are no class probabilities.
    """
    sizes, _, kl = divergence(evidence)
    if kl is None or not sizes.sum():
        raise EvidenceError("KL: found no class probabilities, expected them; leave max_kl out")
    mean = float(kl.sum() / sizes.sum())
    low, high = _nats_interval(kl, sizes, mean, confidence)
    outcome, note = _against(low, high, allowed), ""
    if _open(outcome):
        note = _more_examples(len(sizes), low, high, mean, allowed)
    return _trusted(Check("mean KL", allowed, mean, low, high, outcome, note), len(sizes))


def _check_share(what: str, count: int, size: int, allowed: float, confidence: float) -> Check:
    """Return the check of a share of examples, by its exact bounds."""
    low, high = share_interval(count, size, confidence)
    outcome, note = _against(low, high, allowed), ""
    if _open(outcome):
        note = _more_examples(size, low, high, count / size, allowed)
    return Check(what, allowed, count / size, low, high, outcome, note)


def _trusted(check: Check, size: int) -> Check:
    """Return the check, or an inconclusive one if it rests on too few examples."""
    if size >= FEWEST:
        return check
    note = f"found {size} examples, at least {FEWEST} are needed: {FEWEST - size} more"
    return replace(check, outcome="inconclusive", note=note)


def _against(low: float, high: float, allowed: float) -> Outcome:
    """Return the outcome for a quantity in [low, high] that must stay below `allowed`."""
    if high < allowed:
        return "pass"
    return "fail" if low > allowed else "inconclusive"


def _open(outcome: Outcome) -> bool:
    return outcome == "inconclusive"


def _more_examples(size: int, low: float, high: float, estimate: float, allowed: float) -> str:
    """Say how many more examples would decide: the interval shrinks with their root."""
    margin, half = abs(allowed - estimate), max(high - estimate, estimate - low)
    return _needs(size, (half / margin) ** 2 if margin else math.inf)


def _needs(size: int, times: float) -> str:
    """Say how many more examples would decide, if it takes so many times what there is."""
    if times > FURTHEST:
        return f"the estimate is at the budget: {FURTHEST:,} times as many would not decide"
    more = max(math.ceil(size * times) - size, 1)
    return f"about {more} more examples would decide, if the estimate holds"
