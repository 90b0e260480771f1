"""The candidates of a search: what became of each, which of them are best, what the budget cost.

A candidate's merit is how many times faster than the baseline it is (the geometric mean over the
loads), or how many times smaller.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Annotated, Literal

from pydantic import Field

from pipeline.reading import Positive, Strict
from pipeline.recipe import Recipe
from pipeline.report import Check, Report
from pipeline.trials import Foreseen, Measured, Screened, same_but_for_cuts

Best = Literal["speed", "size"]
State = Literal["measured", "screened out", "dominated", "failed"]


class Settings(Strict):
    """What is searched for, and how long."""

    best: Best = "speed"
    """The geometric mean of the speedups at all loads; or size."""
    trials: int = Field(default=20, ge=1)
    """Candidates at most."""
    seconds: Positive = 4 * 3600.0
    """No candidate is begun after so much work on them, now or before."""
    screen: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """The share of the selection split on which a candidate is judged first."""
    finalists: int = Field(default=2, ge=1)
    """Candidates that meet the gate split at most."""


@dataclass(frozen=True)
class Candidate:
    """One recipe of a search: what was picked, in words by its place, and what is known of it.

    `why` says what it was left for, if it was; `inherited` is the violation of the one that
    dominates it, `took` what a failure took.
    """

    number: int
    picked: Mapping[str, str]
    recipe: Recipe
    state: State = "measured"
    why: str = ""
    foreseen: Foreseen | None = None
    screened: Screened | None = None
    measured: Measured | None = None
    inherited: float = 0.0
    took: float = 0.0

    @property
    def seconds(self) -> float:
        """Return what it took, when it was made; a failure is tried again when a search goes on."""
        known = (self.foreseen, self.screened, self.measured)
        return max(self.took, sum(each.seconds for each in known if each is not None))

    @property
    def outcome(self) -> str | None:
        """Return what the gate's tests say of it on the selection split."""
        if self.measured is None:
            return None
        outcomes = {check.outcome for check in self.measured.checks}
        return next((x for x in ("fail", "inconclusive") if x in outcomes), "pass")

    @property
    def violation(self) -> float:
        """Return by what share of a limit the worst estimate is beyond it; to 0 it is within."""
        known = self.measured or self.screened
        return self.inherited if known is None else _violation(known.checks)

    def merit(self, best: Best) -> float:
        """Return how many times faster, or smaller, it is than the baseline; 0 if not known."""
        known = self.measured or self.foreseen
        if known is None:
            return 0.0
        if best == "size":
            return 1 / known.size
        return geometric_mean(value for value, _, _ in known.speedups)


@dataclass(frozen=True)
class Finalist:
    """A candidate that met the gate split, and the report of its run."""

    candidate: Candidate
    report: Report


@dataclass(frozen=True)
class Found:
    """What a search came to; of the finalists the last may have passed.

    `first` is one of its recipes, `confidence` that at which finalists are judged, `note` why no
    other one met the gate split, `fewer` why there are fewer candidates than trials.
    """

    first: Recipe
    metric: str
    settings: Settings
    confidence: float
    candidates: Sequence[Candidate]
    finalists: Sequence[Finalist] = ()
    ended: bool = False
    note: str = ""
    fewer: str = ""

    @property
    def outcome(self) -> str:
        """Return pass, inconclusive or fail, the best that a finalist came to."""
        outcomes = {finalist.report.verdict.outcome for finalist in self.finalists}
        return next((x for x in ("pass", "inconclusive") if x in outcomes), "fail")


def _violation(checks: Iterable[Check]) -> float:
    return max(
        (
            1 - check.estimate / check.allowed
            if check.at_least
            else check.estimate / check.allowed - 1
            for check in checks
        ),
        default=0.0,
    )


def dominated(candidate: Candidate, others: Iterable[Candidate], best: Best) -> Candidate | None:
    """Return another one that makes it needless to train this one, if there is one.

    They differ in what is cut alone, and the other is better and nearer to the uncut model.
    """
    for other in others:
        if (
            other.state == "failed"
            or other.foreseen is None
            or candidate.foreseen is None
            or other.foreseen.divergence is None
            or candidate.foreseen.divergence is None
            or not same_but_for_cuts(other.recipe, candidate.recipe)
        ):
            continue
        nearer = other.foreseen.divergence <= candidate.foreseen.divergence
        if nearer and other.merit(best) > candidate.merit(best):
            return other
    return None


def beaten(candidate: Candidate, others: Iterable[Candidate], best: Best) -> Candidate | None:
    """Return another one within the budget that is better and lost no more on the part, if any."""
    assert candidate.screened is not None
    for other in others:
        if (
            other.measured is not None
            and other.screened is not None
            and other.violation <= 0
            and other.screened.lost <= candidate.screened.lost
            and other.merit(best) > candidate.merit(best)
        ):
            return other
    return None


def pareto(candidates: Sequence[Candidate], best: Best) -> list[Candidate]:
    """Return those that no other one beats in merit and in score, the best by merit first."""
    known = [(c, c.measured) for c in candidates if c.measured is not None]
    known.sort(key=lambda pair: (-pair[0].merit(best), pair[1].lost, pair[0].number))
    found: list[Candidate] = []
    least = math.inf
    for candidate, measured in known:
        if measured.lost < least:
            found.append(candidate)
            least = measured.lost
    return found


def finalists(candidates: Sequence[Candidate], best: Best) -> list[Candidate]:
    """Return who may meet the gate split, in their order.

    First those that pass the gate's tests on the selection split, then those whose estimates are
    within the budget there; each by merit.
    """
    within = [c for c in candidates if c.measured and c.violation <= 0]
    return sorted(within, key=lambda c: (c.outcome != "pass", -c.merit(best), c.number))


def beyond(candidates: Sequence[Candidate], chosen: Candidate, best: Best) -> Candidate | None:
    """Return the best one whose loss is known, if it is better and beyond the budget: its cost."""
    over = [c for c in candidates if (c.measured or c.screened) and c.violation > 0]
    better = [c for c in over if c.merit(best) > chosen.merit(best)]
    return max(better, key=lambda c: c.merit(best), default=None)
