"""The release gate: is the candidate good enough, and can the data say so?

Every check has three outcomes. It passes when the data prove, at the asked confidence, that the
budget is kept; it fails when they prove that it is not; else it is inconclusive. A point estimate
at the edge of the budget passes half of the time whatever the truth is; these tests pass a model
whose true drop equals the budget with probability 1 - confidence at most.

Baseline and candidate are paired: the same examples in the same order. Anything that is not
comparable, or not a number, is an error, never a pass.

N examples.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import NormalDist
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.figures import Ratio
from benchmarks.metrics import METRICS, Columns, Metric, score
from pipeline.report import Check, Outcome, Stage, Verdict, shape

FEWEST: Final = 30
"""Examples below which an interval that rests on large numbers is not trusted."""
HALVINGS: Final = 50
"""Of the interval in which a bound lies."""
RESAMPLES: Final = 1_999
"""Bootstrap resamples of a corpus metric; one seed, so that a verdict can be reproduced."""


class EvidenceError(ValueError):
    """The evidence is not fit to judge on."""


class Limits(Protocol):
    """The budget that is judged; recipe.Budget is one. None is not checked."""

    @property
    def max_drop(self) -> float | None: ...  # noqa: D102
    @property
    def max_perplexity_ratio(self) -> float | None: ...  # noqa: D102
    @property
    def confidence(self) -> float: ...  # noqa: D102
    @property
    def min_speedup(self) -> float | None: ...  # noqa: D102
    @property
    def max_size(self) -> float | None: ...  # noqa: D102
    @property
    def max_memory(self) -> float | None: ...  # noqa: D102


def judge(checks: tuple[Check, ...]) -> Verdict:
    """Return the verdict over all checks: one failure fails, and only all passes pass."""
    outcomes = {check.outcome for check in checks}
    outcome: Outcome = (
        "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    )
    return Verdict(outcome, checks)


def checks(
    limits: Limits, metric: str, baseline: Columns, candidate: Columns, stages: Sequence[Stage]
) -> tuple[Check, ...]:
    """Return the check of every limit that is set.

    Args:
        limits: the budget.
        metric: a key of `METRICS`.
        baseline: the columns of the first stage.
        candidate: the columns of the last stage.
        stages: the baseline first.

    Raises:
        EvidenceError: something is not comparable, missing, or not a number.
    """
    first, last = stages[0], stages[-1]
    found = []
    limited = {"max_drop": limits.max_drop, "max_perplexity_ratio": limits.max_perplexity_ratio}
    fitting = "max_perplexity_ratio" if METRICS[metric].kind == "perplexity" else "max_drop"
    allowed = limited.pop(fitting)
    for other, given in limited.items():
        if given is not None:
            raise EvidenceError(f"budget: found {other}, expected {fitting}, the limit of {metric}")
    if allowed is not None:
        found.append(
            check_score(metric, baseline, candidate, allowed=allowed, confidence=limits.confidence)
        )
    if limits.min_speedup is not None:
        found.extend(
            check_speedup(shape(asdict(load)), load.speedup, limits.min_speedup)
            for load in last.loads
        )
    if limits.max_size is not None:
        found.append(check_ratio("size", last.size_bytes, first.size_bytes, limits.max_size))
    if limits.max_memory is not None:
        before, after = (stage.memory["peak_rss_bytes"] for stage in (first, last))
        if before is None or after is None:
            raise EvidenceError("peak memory: found no measurement, expected one")
        found.append(check_ratio("peak memory", after, before, limits.max_memory))
    return tuple(found)


def check_score(
    metric_name: str, baseline: Columns, candidate: Columns, *, allowed: float, confidence: float
) -> Check:
    """Return the check of the score: the drop, or for perplexity the ratio, against `allowed`.

    Args:
        metric_name: a key of `METRICS`.
        baseline: the baseline's columns, one row an example.
        candidate: the candidate's, the same examples in the same order.
        allowed: the largest absolute drop, or the largest ratio of perplexities.
        confidence: of the one-sided test, for pass and for fail alike.

    Raises:
        EvidenceError: the columns do not match, are empty, or hold NaN.
    """
    metric = METRICS[metric_name]
    _comparable(baseline, candidate)
    size = len(next(iter(baseline.values())))
    if metric.kind == "perplexity":
        return _trusted(_check_perplexity(baseline, candidate, allowed, confidence), size)
    estimate = score(metric_name, baseline) - score(metric_name, candidate)
    if metric.kind == "binary":
        low, high = _binary(metric, baseline, candidate, confidence)
    elif metric.kind == "mean":
        values = np.asarray(metric.function(baseline)) - np.asarray(metric.function(candidate))
        low, high = mean_interval(values, confidence)
    else:
        low, high = _bootstrap(metric, baseline, candidate, confidence)
    outcome = _against(low, high, allowed)
    note = ""
    if outcome == "inconclusive":
        note = _more_examples(size, low, high, estimate, allowed)
    check = Check(metric_name + " drop", allowed, estimate, low, high, outcome, note)
    return check if metric.kind == "binary" else _trusted(check, size)


def _trusted(check: Check, size: int) -> Check:
    """Return the check, or an inconclusive one if it rests on too few examples."""
    if size >= FEWEST:
        return check
    note = f"found {size} examples, at least {FEWEST} are needed"
    return replace(check, outcome="inconclusive", note=note)


def check_speedup(load: str, ratio: Ratio, allowed: float) -> Check:
    """Return the check of a speedup that must be at least `allowed`."""
    value, low, high = (_number("speedup", x) for x in (ratio.value, ratio.low, ratio.high))
    outcome: Outcome = "pass" if low >= allowed else "fail" if high < allowed else "inconclusive"
    note = "measure more rounds (target.rounds)" if outcome == "inconclusive" else ""
    return Check(f"speedup at {load}", allowed, value, low, high, outcome, note, at_least=True)


def check_ratio(what: str, candidate: float, baseline: float, allowed: float) -> Check:
    """Return the check of an exact quantity that may be at most `allowed` of the baseline's."""
    if not _number(what, baseline) > 0:
        raise EvidenceError(f"{what}: found {baseline} for the baseline, expected more than 0")
    ratio = _number(what, candidate) / baseline
    return Check(what, allowed, ratio, ratio, ratio, "pass" if ratio <= allowed else "fail")


def tango(wrong: int, mended: int, examples: int, difference: float) -> float:
    """Return Tango's score statistic for H0: candidate - baseline = `difference`.

    Args:
        wrong: examples that only the baseline gets right (b).
        mended: examples that only the candidate gets right (c).
        examples: all of them (n).
        difference: of the two accuracies, in (-1, 1).

    Tango 1998, Statistics in Medicine 17:891-908.
    """
    a = 2 * examples
    b = -(wrong + mended) + (2 * examples - mended + wrong) * difference
    c = -wrong * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = examples * (2 * q + difference * (1 - difference))
    shift = mended - wrong - examples * difference
    if variance <= 0:
        return math.copysign(math.inf, shift) if shift else 0.0
    return shift / math.sqrt(variance)


def tango_interval(
    wrong: int, mended: int, examples: int, confidence: float
) -> tuple[float, float]:
    """Return the bounds of candidate - baseline, each one-sided at `confidence`."""
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


def mean_interval(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Return the bounds of the mean of paired differences `(N,)`, each one-sided (t)."""
    from scipy.special import stdtrit  # not scipy.stats, which takes half a second to import

    count = len(values)
    if count < 2:  # noqa: PLR2004
        raise EvidenceError(f"score: found {count} example, expected at least 2")
    half = float(stdtrit(count - 1, confidence) * values.std(ddof=1) / math.sqrt(count))
    mean = float(values.mean())
    return mean - half, mean + half


def _binary(
    metric: Metric, baseline: Columns, candidate: Columns, confidence: float
) -> tuple[float, float]:
    before, after = (np.asarray(metric.function(c), bool) for c in (baseline, candidate))
    wrong, mended = int((before & ~after).sum()), int((~before & after).sum())
    low, high = tango_interval(wrong, mended, len(before), confidence)
    return -high, -low


def _bootstrap(
    metric: Metric, baseline: Columns, candidate: Columns, confidence: float
) -> tuple[float, float]:
    """Return percentile bounds of the drop of a corpus metric, over resampled examples."""
    size = len(next(iter(baseline.values())))
    generator = np.random.default_rng(0)
    drops = np.empty(RESAMPLES)
    for at in range(RESAMPLES):
        chosen = generator.integers(0, size, size)
        before, after = (
            float(np.mean(metric.function({name: v[chosen] for name, v in columns.items()})))
            for columns in (baseline, candidate)
        )
        drops[at] = before - after
    return float(np.quantile(drops, 1 - confidence)), float(np.quantile(drops, confidence))


def _check_perplexity(
    baseline: Columns, candidate: Columns, allowed: float, confidence: float
) -> Check:
    """Judge the ratio of perplexities: the mean difference of log-likelihoods a token.

    An example is a document; the ratio estimator's residuals are taken by document, since tokens
    of a document are not independent (Cochran 1977, Sampling Techniques, section 6).
    """
    tokens = np.asarray(baseline["tokens"], np.float64)
    difference = np.asarray(candidate["nll"] - baseline["nll"], np.float64)
    mean = float(difference.sum() / tokens.sum())
    residuals = (difference - mean * tokens) / tokens.mean()
    low, high = mean_interval(residuals, confidence)
    estimate, low, high = (math.exp(mean + x) for x in (0.0, low, high))
    outcome = _against(low, high, allowed)
    note = ""
    if outcome == "inconclusive":
        logs = [math.log(x) for x in (low, high, estimate, allowed)]
        note = _more_examples(len(tokens), *logs)
    return Check("perplexity ratio", allowed, estimate, low, high, outcome, note)


def _against(low: float, high: float, allowed: float) -> Outcome:
    """Return the outcome for a quantity in [low, high] that must stay below `allowed`."""
    if high < allowed:
        return "pass"
    return "fail" if low > allowed else "inconclusive"


def _more_examples(size: int, low: float, high: float, estimate: float, allowed: float) -> str:
    """Say how many more examples would decide, if the estimate is the truth."""
    margin = abs(allowed - estimate)
    half = max(high - estimate, estimate - low)
    if margin < half / 30:
        return "the estimate equals the budget: no number of examples will decide"
    needed = math.ceil(size * (half / margin) ** 2) - size
    return f"about {max(needed, 1)} more examples would decide, if the estimate holds"


def _comparable(baseline: Columns, candidate: Columns) -> None:
    if set(baseline) != set(candidate) or not baseline:
        raise EvidenceError(
            f"score: found columns {sorted(baseline)} and {sorted(candidate)}, expected the same"
        )
    for name in baseline:
        if baseline[name].shape != candidate[name].shape or not len(baseline[name]):
            raise EvidenceError(
                f"score: found {len(baseline[name])} and {len(candidate[name])} examples,"
                " expected the same examples, at least one"
            )
        for columns in (baseline, candidate):
            if not np.all(np.isfinite(columns[name])):
                raise EvidenceError(f"score: found NaN or infinity in {name!r}, expected numbers")
    for name in ("label", "tokens"):
        if name in baseline and not np.array_equal(baseline[name], candidate[name]):
            raise EvidenceError(
                f"score: found other values of {name!r}, expected the same examples"
            )


def _number(what: str, value: float) -> float:
    if not math.isfinite(value):
        raise EvidenceError(f"{what}: found {value}, expected a number")
    return value
