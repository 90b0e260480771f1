"""The release gate: is the candidate good enough, and can the data say so?

Every check has three outcomes. It passes when the data prove, at the asked confidence, that the
budget is kept; it fails when they prove that it is not; else it is inconclusive, and says how many
more examples would decide. A point estimate at the edge of the budget passes half of the time
whatever the truth is; these tests pass a model whose true drop equals the budget with probability
1 - confidence at most: exactly so for shares and right and wrong answers, nearly so for the others.
Of a perplexity and a KL, which know no most that an example can lose, that holds for models that
break few documents by a nat a token at most (`quality.BROKEN`). Times, whose intervals hold with
95 %, are judged at 0.975.

Limits of several slices, metrics or baselines are each judged at that confidence: all have to pass,
so a bad one is let through no more often than if it were alone (an intersection-union test, Berger
1982, Technometrics 24:295-300).

N examples.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np

from pipeline import quality
from pipeline.budget import Budget, Limits, Regression, Slices
from pipeline.evidence import Evidence, EvidenceError, check_fit, check_floor
from pipeline.report import Check, Outcome, Stage, Verdict, shape

RELEASED: Final = " against released"
"""Behind the names of the checks of a regression."""
PERCENTILES: Final = ("p50", "p95", "p99")


def judge(checks: tuple[Check, ...]) -> Verdict:
    """Return the verdict over all checks: one failure fails, and only all passes pass."""
    outcomes = {check.outcome for check in checks}
    outcome: Outcome = (
        "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    )
    return Verdict(outcome, checks)


def checks(
    budget: Budget, evidence: Evidence, released: Evidence | None = None
) -> tuple[Check, ...]:
    """Return the check of every limit that is set.

    Args:
        budget: the limits.
        evidence: of the candidate and the run's baseline.
        released: of the candidate and the artifact that was released last.

    Raises:
        EvidenceError: something is not comparable, missing, or not a number.
    """
    found = [*_compared(budget, evidence, budget.confidence)]
    regression = budget.regression
    of_regression = regression is not None and regression.of_quality
    if of_regression or budget.of_quality or budget.slices is not None:
        check_floor(evidence.metric, evidence.baseline.columns, budget.baseline_floor)
    found += _measured(budget, evidence)
    if budget.slices is not None:
        found += _slices(budget.slices, evidence, budget.confidence)
    if regression is not None:
        if released is None:
            raise EvidenceError("budget.regression: found no released report, expected one")
        if of_regression:
            check_floor(released.metric, released.baseline.columns, budget.baseline_floor)
        found += [
            replace(check, what=check.what + RELEASED)
            for check in _compared(regression, released, budget.confidence)
        ]
    if not found:
        raise EvidenceError("budget: found no limit, expected at least one")
    return tuple(found)


def _measured(budget: Budget, evidence: Evidence) -> Iterator[Check]:
    """Yield the checks of what a run alone can tell: speed, and what is no comparison."""
    last = evidence.last
    if budget.absolute and not evidence.dedicated:
        raise EvidenceError(
            f"budget: found {', '.join(budget.absolute)}, which hold on a target that nothing else"
            " runs on; expected `dedicated: true` under target, or ratios alone"
        )
    if (least := budget.min_speedup) is not None:
        yield from (check_speedup(shape(load), load["speedup"], least) for load in _loads(last))
    if (most := budget.max_energy) is not None:
        yield from (check_energy(load, most) for load in _loads(last))
    for name in PERCENTILES:
        if (most := getattr(budget, f"max_{name}_ms")) is not None:
            yield from (check_latency(name, load, most) for load in _loads(last))
    if (most := budget.max_peak_mb) is not None:
        yield _exact("peak memory in MB", _peak(last) / 1e6, most)
    if (most := budget.max_mb) is not None:
        yield _exact("size in MB", last.size_bytes / 1e6, most)
    if (least := budget.min_throughput_per_s) is not None:
        yield from (check_throughput(load, least) for load in _loads(last))


def against_released(budget: Budget, report: str) -> Budget:
    """Return the budget with checks against a released report.

    They are those under `regression`, or where there are none the budget's own that compare.

    Raises:
        EvidenceError: none of them compares.
    """
    limits = budget.regression or Limits(**{n: getattr(budget, n) for n in Limits.model_fields})
    if not limits.model_dump(exclude_none=True, exclude={"report"}):
        raise EvidenceError(
            f"budget: found no limit to compare with {report} by, expected one of"
            f" {sorted(Limits.model_fields)}"
        )
    regression = Regression(**{**limits.model_dump(), "report": report})
    return budget.model_copy(update={"regression": regression})


def _compared(limits: Limits, evidence: Evidence, confidence: float) -> Iterator[Check]:
    """Yield the checks of what two artifacts can be compared by."""
    first, last = evidence.first, evidence.last
    check_fit(evidence)
    yield from quality.check_scores(limits, evidence.metric, evidence.baseline.columns,
                       evidence.candidate.columns, confidence)  # fmt: skip
    if limits.max_flips is not None:
        yield quality.check_flips(evidence, limits.max_flips, confidence)
    if limits.min_agreement is not None:
        yield quality.check_agreement(evidence, limits.min_agreement, confidence)
    if limits.max_kl is not None:
        yield quality.check_kl(evidence, limits.max_kl, confidence)
    if limits.max_size is not None:
        yield check_ratio("size", last.size_bytes, first.size_bytes, limits.max_size)
    if limits.max_memory is not None:
        if differ := [
            n for n, known in evidence.places[0].items() if evidence.places[1][n] != known
        ]:
            raise EvidenceError(
                f"peak memory: found it measured with other {', '.join(differ)}, expected the same;"
                " run the released recipe here"
            )
        yield check_ratio("peak memory", _peak(last), _peak(first), limits.max_memory)


def _slices(limits: Slices, evidence: Evidence, confidence: float) -> Iterator[Check]:
    """Yield the checks of every slice."""
    if limits.column not in evidence.slices:
        raise EvidenceError(
            f"budget.slices: found no column {limits.column!r} in the evidence, expected it; run"
            " the recipe with these slices in its budget"
        )
    values = np.asarray(evidence.slices[limits.column])
    if missing := sorted(set(limits.values) - set(values.tolist())):
        raise EvidenceError(
            f"budget.slices: found no example with {limits.column} {', '.join(missing)}, expected"
            " some"
        )
    for value in sorted(set(values.tolist())):
        baseline, candidate = (
            {name: array[values == value] for name, array in outcomes.columns.items()}
            for outcomes in (evidence.baseline, evidence.candidate)
        )
        size = int((values == value).sum())
        least = limits.least(value)
        more = least - size
        few = f"found {size} examples, at least {least} are asked for: {more} more"
        for check in quality.check_scores(limits, evidence.metric, baseline, candidate, confidence):
            named = replace(check, what=f"{check.what}, {limits.column} {value}")
            yield replace(named, outcome="inconclusive", note=few) if more > 0 else named


def check_speedup(load: str, ratio: Mapping[str, float], allowed: float) -> Check:
    """Return the check of a speedup (`value`, `low`, `high`) that must be at least `allowed`."""
    value, low, high = (_number("speedup", ratio.get(name)) for name in ("value", "low", "high"))
    outcome: Outcome = "pass" if low >= allowed else "fail" if high < allowed else "inconclusive"
    note = "measure more rounds (target.rounds)" if outcome == "inconclusive" else ""
    return Check(f"speedup at {load}", allowed, value, low, high, outcome, note, at_least=True)


def check_energy(load: Mapping[str, Any], allowed: float) -> Check:
    """Return the check of the energy of a call, as a ratio to the baseline's, by its interval."""
    what, ratio = f"energy at {shape(load)}", load.get("energy")
    if ratio is None:
        raise EvidenceError(
            f"{what}: found no measurement, expected one; no sensor of energy could be read where"
            " it was run, or it stood still"
        )
    bounds = (_number(what, ratio.get(name)) for name in ("value", "low", "high"))
    return _at_most(what, allowed, *bounds, note="the turns differ too much; run it undisturbed")


def _at_most(
    what: str, allowed: float, value: float, low: float, high: float, *, note: str
) -> Check:
    """Return the check of a quantity by its interval; `note` says what to do if it is open."""
    outcome: Outcome = "pass" if high <= allowed else "fail" if low > allowed else "inconclusive"
    return Check(what, allowed, value, low, high, outcome, note * (outcome == "inconclusive"))


def check_latency(name: str, load: Mapping[str, Any], allowed: float) -> Check:
    """Return the check of a percentile of a load's latencies, in ms, by its interval."""
    what, latency = f"{name} at {shape(load)} in ms", load["latency_ms"]
    if not latency.get("intervals"):  # schema 2
        raise EvidenceError(
            f"{what}: found a report of an earlier release, which kept no intervals of latencies, "
            "expected one that does; run the recipe again"
        )
    bounds = latency["intervals"].get(name, (None, None))
    if latency.get(name) is None or None in bounds:
        raise EvidenceError(
            f"{what}: found too few samples for its interval, expected more; raise target.rounds"
        )
    found = (_number(what, x) for x in (latency[name], *bounds))
    return _at_most(what, allowed, *found, note="measure more rounds (target.rounds)")


def check_throughput(load: Mapping[str, Any], least: float) -> Check:
    """Return the check of the examples a second: those of a batch in the median latency."""
    p50 = check_latency("p50", load, load["batch"] * 1e3 / least)
    value, low, high = (load["batch"] * 1e3 / x for x in (p50.estimate, p50.high, p50.low))
    what = f"examples a second at {shape(load)}"
    return Check(what, least, value, low, high, p50.outcome, p50.note, at_least=True)


def check_ratio(what: str, candidate: float, baseline: float, allowed: float) -> Check:
    """Return the check of an exact quantity that may be at most `allowed` of the baseline's."""
    if not _number(what, baseline) > 0:
        raise EvidenceError(f"{what}: found {baseline} for the baseline, expected more than 0")
    return _exact(what, _number(what, candidate) / baseline, allowed)


def _exact(what: str, value: float, allowed: float) -> Check:
    if not _number(what, value) > 0:
        raise EvidenceError(f"{what}: found {value}, expected more than 0")
    return Check(what, allowed, value, value, value, "pass" if value <= allowed else "fail")


def _loads(stage: Stage) -> list[dict[str, Any]]:
    if not stage.loads:
        raise EvidenceError(f"{stage.name}: found no loads, expected one at least")
    return [asdict(load) for load in stage.loads]


def _peak(stage: Stage) -> int:
    peak = stage.memory.get("peak_rss_bytes")
    if peak is None:
        raise EvidenceError("peak memory: found no measurement, expected one")
    return peak


def _number(what: str, value: float | None) -> float:
    if value is None or not math.isfinite(value):
        raise EvidenceError(f"{what}: found {value}, expected a number")
    return value
