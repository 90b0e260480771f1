"""What a verdict rests on, and whether it is fit for that.

Baseline and candidate are paired: the same examples in the same order, each of them once. Whatever
is missing, not comparable, not a number, or not what the report says of it is an error, never a
pass.

N examples, D decisions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.metrics import METRICS, Columns, score
from benchmarks.outcomes import Outcomes, divergences
from pipeline.report import Stage

Floats = NDArray[np.float64]

ROUNDED: Final = 1e-3
"""How far from 1 the sum of class probabilities may be that were computed in half precision."""


class EvidenceError(ValueError):
    """The evidence is not fit to judge on."""


@dataclass(frozen=True)
class Evidence:
    """Outcomes of the gate's examples and the measured stages, of baseline and candidate.

    `labels` are the names of the task's labels, `slices` the value of every example `(N,)` in the
    column that the examples are cut by, `dedicated` whether nothing else runs on the target,
    `places` where each of the two was measured, by name of what must be equal.
    """

    baseline: Outcomes
    candidate: Outcomes
    first: Stage
    last: Stage
    labels: Sequence[str] = ()
    slices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    dedicated: bool = False
    places: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})

    @property
    def metric(self) -> str:
        """The name of the metric that is judged by."""
        return self.last.score.metric


def check_fit(evidence: Evidence) -> None:
    """Refuse evidence that no verdict can rest on.

    Raises:
        EvidenceError: it is not fit.
    """
    before, after, metric = evidence.baseline, evidence.candidate, evidence.metric
    if metric not in METRICS or evidence.first.score.metric != metric:
        names = sorted({metric, evidence.first.score.metric})
        raise EvidenceError(f"score: found {names}, expected one metric, of {sorted(METRICS)}")
    _check_paired(before, after)
    check_columns(before.columns, after.columns)
    for outcomes, stage in ((before, evidence.first), (after, evidence.last)):
        _check_classes(outcomes.columns, len(evidence.labels))
        _check_report(outcomes, stage)
    for column, values in evidence.slices.items():
        if len(values) != len(before.ids):
            raise EvidenceError(
                f"slices: found {len(values)} values of {column!r}, expected {len(before.ids)}"
            )


def _check_paired(baseline: Outcomes, candidate: Outcomes) -> None:
    if not baseline.ids:
        raise EvidenceError("evidence: found no examples, expected at least one")
    if baseline.ids != candidate.ids:
        raise EvidenceError("evidence: found other examples on one side, expected the same ones")
    if len(set(baseline.ids)) != len(baseline.ids):
        raise EvidenceError("evidence: found an example twice, expected each of them once")
    for outcomes in (baseline, candidate):
        lengths = {name: len(values) for name, values in outcomes.columns.items()}
        if set(lengths.values()) - {len(outcomes.ids)}:
            raise EvidenceError(f"evidence: found {lengths} values, expected {len(outcomes.ids)}")


def check_columns(baseline: Columns, candidate: Columns) -> None:
    """Refuse columns of other examples, or with what is no number.

    Raises:
        EvidenceError: they do not match, are empty, or hold NaN.
    """
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
    for name in ("label", "score", "tokens"):
        if name in baseline and not np.array_equal(baseline[name], candidate[name]):
            raise EvidenceError(
                f"score: found other values of {name!r}, expected the same examples"
            )


def _check_classes(columns: Columns, labels: int) -> None:
    """Refuse classes that the label map does not have, where there is one."""
    for name in ("label", "prediction"):
        if name in columns and labels:
            values = columns[name]
            if values.min() < 0 or values.max() >= labels:
                raise EvidenceError(
                    f"score: found {name}s from {values.min()} to {values.max()}, expected those of"
                    f" {labels} labels"
                )


def _check_report(outcomes: Outcomes, stage: Stage) -> None:
    """Refuse outcomes that do not give the score which the report says they do."""
    try:
        found = score(stage.score.metric, outcomes.columns)
    except (KeyError, ValueError) as error:
        raise EvidenceError(f"score: no {stage.score.metric} of these outcomes: {error}") from None
    if stage.score.examples != len(outcomes.ids):
        raise EvidenceError(
            f"{stage.name}: found {len(outcomes.ids)} outcomes, expected {stage.score.examples}"
        )
    if not math.isclose(found, stage.score.value, rel_tol=1e-9, abs_tol=1e-12):
        raise EvidenceError(
            f"{stage.name}: found outcomes with {stage.score.metric} {found:.6g}, expected the"
            f" report's {stage.score.value:.6g}"
        )


def check_floor(metric: str, columns: Columns, floor: float | None = None) -> None:
    """Refuse a baseline that knows nothing: little can be lost of it.

    Args:
        metric: the name of the metric.
        columns: the baseline's.
        floor: what its score has to be better than; the metric's own unless given.

    Raises:
        EvidenceError: it is no better.
    """
    found, why = score(metric, columns), "budget.baseline_floor"
    if metric == "perplexity":
        if floor is not None and not found < floor:
            raise EvidenceError(
                f"baseline: found perplexity {found:.4g}, expected less than {floor:g}, {why}"
            )
        return
    if floor is None:
        floor, why = _floor(metric, columns)
    if not found > floor:
        raise EvidenceError(
            f"baseline: found {metric} {found:.4g}, expected more than {floor:.4g}, {why}; take a"
            " trained model as baseline"
        )


def _floor(metric: str, columns: Columns) -> tuple[float, str]:
    """Return the score of a model that has learnt nothing, and what it does."""
    if "label" not in columns:
        return 0.0, "that of answers which are all wrong"
    most = np.bincount(columns["label"]).argmax()
    constant = {**columns, "prediction": np.full_like(columns["label"], most)}
    return score(metric, constant), "that of answering the most frequent label alone"


def divergence(evidence: Evidence) -> tuple[Floats, Floats, Floats | None]:
    """Return by example `(N,)` how many decisions it has, how many differ, and their summed KL.

    The divergence is KL(baseline || candidate) in nats, None where there are no probabilities.

    Raises:
        EvidenceError: the two sides do not have the same decisions, or no probabilities.
    """
    before, after = evidence.baseline, evidence.candidate
    lengths = before.lengths if before.lengths is not None else np.ones(len(before.ids), np.int64)
    for outcomes in (before, after):
        arrays = [outcomes.decisions]
        if outcomes.log_probabilities is not None:
            arrays.append(outcomes.log_probabilities)
        same = outcomes.lengths is None or np.array_equal(outcomes.lengths, lengths)
        if not same or any(len(array) != lengths.sum() for array in arrays) or lengths.min() < 0:
            raise EvidenceError(
                f"agreement: found {len(outcomes.decisions)} decisions, expected {lengths.sum()},"
                " those of the same examples"
            )
    # Behind the last one, for an example without any decision may be the last.
    starts = np.concatenate([[0], np.cumsum(lengths)])

    def by_example(values: NDArray[Any]) -> Floats:
        total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        return total[starts[1:]] - total[starts[:-1]]

    kl = None
    if before.log_probabilities is not None and after.log_probabilities is not None:
        p, q = (np.asarray(o.log_probabilities, np.float64) for o in (before, after))
        if p.shape != q.shape or not (np.all(np.isfinite(p)) and np.all(np.isfinite(q))):
            raise EvidenceError("KL: found other classes, NaN or infinity, expected probabilities")
        totals = np.exp(np.concatenate([p, q])).sum(axis=-1)
        if not np.all(np.abs(totals - 1) <= ROUNDED):
            raise EvidenceError(
                f"KL: found probabilities that add up to between {totals.min():.4g} and"
                f" {totals.max():.4g}, expected 1"
            )
        kl = by_example(divergences(p, q))
    return lengths.astype(np.float64), by_example(before.decisions != after.decisions), kl
