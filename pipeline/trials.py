"""What one candidate of a search comes to, from the cheapest that can be known of it to the whole.

`foresee` makes it without its trainings, times that beside the baseline in the target's runtime and
says how far its outputs are from the uncut model's; `screen` makes it whole and judges it on a part
of the selection split, `measure` on all of it, by the tests of the gate. What is made and measured
are entries of the store, so that a search that goes on finds what it knew; it is judged anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from benchmarks import metrics, speed
from benchmarks.outcomes import Outcomes
from pipeline import checkpoint, gate, measuring, prices, quality, schedules, stages
from pipeline.budget import Budget
from pipeline.checkpoint import ModelError
from pipeline.compression import compress
from pipeline.distillation import divergence
from pipeline.evidence import Evidence
from pipeline.masks import LEARNERS
from pipeline.measuring import Bench
from pipeline.recipe import Recipe
from pipeline.report import Check
from pipeline.settings import Finetune, Prune, Quantize
from pipeline.work import Artifact, Work

T = TypeVar("T")
Speedups = tuple[tuple[float, float, float], ...]
"""Value, low and high at every load."""

INSTEAD: Final = ("importance", "magnitude")
"""The criterion of a candidate that is not trained, in place of one that learns: with calibration
data, and without."""


@dataclass(frozen=True)
class Foreseen:
    """How fast and small a candidate is, and how far from the uncut model; before any training.

    `size` is the ratio to the baseline, `divergence` that of the outputs on held-out calibration
    data in nats, before quantization, None without such data.
    """

    speedups: Speedups
    size: float
    divergence: float | None
    seconds: float


@dataclass(frozen=True)
class Screened:
    """What was lost on a part of the selection split (`metrics.lost`), and the checks there."""

    lost: float
    checks: tuple[Check, ...]
    seconds: float


@dataclass(frozen=True)
class Measured:
    """The score on the selection split, what was lost, all checks of the budget, the speedups."""

    score: float
    lost: float
    checks: tuple[Check, ...]
    speedups: Speedups
    size: float
    seconds: float


def untrained(recipe: Recipe) -> Recipe:
    """Return the recipe without the trainings after its baseline, and without what rests on them.

    It is as fast and as small, but where a limit of a step would have left more.
    """
    instead = INSTEAD[recipe.task.splits.calibration is None]
    before, after = recipe.steps[: recipe.baseline_at], recipe.steps[recipe.baseline_at :]
    lean = [_untrained(step, instead) for step in after if not isinstance(step, Finetune)]
    return recipe.model_copy(update={"steps": (*before, *lean)})


def _untrained(step: Any, instead: str) -> Any:
    without_limit: dict[str, Any] = {"max_drop": None, "max_perplexity_ratio": None}
    if isinstance(step, Prune):
        changes = without_limit | {"finetune": None, "rounds": 1}
        learns = step.criterion in LEARNERS
        return step.model_copy(update=changes | ({"criterion": instead} if learns else {}))
    return step.model_copy(update=without_limit) if isinstance(step, Quantize) else step


def same_but_for_cuts(first: Recipe, second: Recipe) -> bool:
    """Whether two recipes are trained and quantized alike."""
    return _without_cuts(first) == _without_cuts(second)


def _without_cuts(recipe: Recipe) -> list[Any]:
    return [
        (s.finetune, s.rounds, s.allowed, s.criterion in LEARNERS) if isinstance(s, Prune) else s
        for s in recipe.steps
    ]


def foresee(work: Work, recipe: Recipe) -> Foreseen:
    """Return what can be said of a candidate without training it."""
    here = work.of(untrained(recipe))

    def act() -> tuple[Speedups, float, float | None]:
        artifacts = compress(here)
        baseline, last = artifacts[recipe.baseline_at], artifacts[-1]
        first, this = (stages.running_of(here, each) for each in (baseline, last))
        folders = {first.digest: first.folder, this.digest: this.folder}
        latencies = measuring.together(prices.bench(here, "selection"), folders).latencies
        both = zip(latencies[first.digest], latencies[this.digest], strict=True)
        ratios = [speed.ratio(before, after) for before, after in both]
        sizes = [stages.size_bytes(each.entry.folder) for each in (last, baseline)]
        return (
            tuple((ratio.value, ratio.low, ratio.high) for ratio in ratios),
            sizes[0] / sizes[1],
            _divergence(here, baseline, artifacts),
        )

    found, seconds = _timed(here, "foreseen", act)
    return Foreseen(*found, seconds)


def _divergence(work: Work, baseline: Artifact, artifacts: Sequence[Artifact]) -> float | None:
    last = [artifact for artifact in artifacts if artifact.format == "torch"][-1]
    if "calibration" not in work.rows or (last.step and last.step["step"] == "quantize"):
        return None

    def make(_: Path) -> dict[str, Any]:
        model, uncut = (checkpoint.from_pretrained(each.entry.folder) for each in (last, baseline))
        return {"divergence": divergence(model, uncut, list(schedules.held_out(work)))}

    key = {"models": [last.entry.digest, baseline.entry.digest]}
    found: float = work.make("apart", key | {"data": work.evidence("calibration")}, make).about[
        "divergence"
    ]
    return found


def screen(work: Work, recipe: Recipe, share: float) -> Screened:
    """Return what a candidate comes to on a share of the selection split.

    Raises:
        ModelError: its score is not a number.
    """
    here = work.of(recipe)

    def act() -> tuple[Outcomes, ...]:
        artifacts = compress(here)
        bench = _part(prices.bench(here, "selection"), share, recipe.seed)
        both = [
            stages.running_of(here, each) for each in (artifacts[recipe.baseline_at], artifacts[-1])
        ]
        return tuple(measuring.alone(bench, each.folder, each.digest).outcomes for each in both)

    (before, after), seconds = _timed(here, f"screened {share}", act)
    try:
        scores = [metrics.score(work.metric, each.columns) for each in (before, after)]
    except ValueError as error:
        raise ModelError(f"{work.metric}: {error}") from error
    checks = quality.check_scores(
        recipe.budget, work.metric, before.columns, after.columns, recipe.budget.confidence
    )
    return Screened(metrics.lost(work.metric, *scores), tuple(checks), seconds)


def _part(bench: Bench, share: float, seed: int) -> Bench:
    """Return a bench with a share of the examples, in random order, at least one."""
    count = max(1, round(share * len(bench.examples)))
    order = np.random.default_rng(seed).permutation(len(bench.examples))[:count]
    examples = [bench.examples[at] for at in order]
    return replace(bench, examples=examples, evidence=f"{bench.evidence} {share} {seed}")


def measure(work: Work, recipe: Recipe) -> Measured:
    """Return what a candidate comes to on the selection split, judged as the gate judges."""
    here = work.of(recipe)

    def act() -> stages.Measured:
        artifacts = compress(here)
        return stages.measure(here, [artifacts[recipe.baseline_at], artifacts[-1]], "selection")

    found, seconds = _timed(here, "measured whole", act)
    first, last = found.stages
    dedicated = recipe.target.dedicated
    evidence = Evidence(
        found.baseline, found.candidate, first, last, here.labels, dedicated=dedicated
    )
    return Measured(
        last.score.value,
        metrics.lost(work.metric, first.score.value, last.score.value),
        gate.checks(_own(recipe.budget), evidence),
        tuple((load.speedup.value, load.speedup.low, load.speedup.high) for load in last.loads),
        last.size_bytes / first.size_bytes,
        seconds,
    )


def digest(work: Work, recipe: Recipe) -> str:
    """Return the digest of what the gate would judge of a candidate."""
    here = work.of(recipe)
    return stages.running_of(here, compress(here)[-1]).digest


def _own(budget: Budget) -> Budget:
    """Return the budget without slices and release, which are of the gate split alone."""
    return budget.model_copy(update={"regression": None, "slices": None})


def _timed(work: Work, what: str, act: Callable[[], T]) -> tuple[T, float]:
    """Return what an act gives, which is in the store afterwards, and what it took at first."""
    made: list[T] = []

    def make(_: Path) -> dict[str, Any]:
        made.append(act())
        return {}

    described = work.recipe.model_dump(mode="json")
    key = {
        "tried": what,
        "model": work.identity,
        "recipe": {name: described[name] for name in ("steps", "baseline", "seed")},
        "data": {name: work.evidence(name) for name in work.rows},
        "target": work.described()["target"],
        "machine": work.machine.identity(),
    }
    seconds: float = work.make("tried", key, make).about["seconds"]
    return made[0] if made else act(), seconds
