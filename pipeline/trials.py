"""What one candidate of a search comes to, from the cheapest that can be known of it to the whole.

`foresee` makes it without its trainings, times that beside the baseline in the target's runtime and
says how far its outputs are from the uncut model's; `screen` makes it whole and judges it on a part
of the selection split, `measure` on all of it, by the tests of the gate. Each is an entry of the
store, so that a search that goes on finds what it knew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import metrics, speed
from pipeline import checkpoint, gate, measuring, prices, quality, schedules, stages
from pipeline.budget import Budget
from pipeline.compression import compress
from pipeline.distillation import divergence
from pipeline.evidence import Evidence
from pipeline.masks import LEARNERS
from pipeline.measuring import Bench
from pipeline.recipe import Recipe
from pipeline.report import Check
from pipeline.settings import Finetune, Prune, Quantize
from pipeline.work import Artifact, Work

INSTEAD: Final = "importance"
"""The criterion of a candidate that is not trained, in place of one that learns."""


@dataclass(frozen=True)
class Foreseen:
    """How fast and small a candidate is, and how far from the uncut model; before any training.

    `speedups` are value, low and high at every load, `size` the ratio to the baseline,
    `divergence` that of the outputs on held-out calibration data in nats, before quantization, None
    without such data.
    """

    speedups: tuple[tuple[float, float, float], ...]
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
    speedups: tuple[tuple[float, float, float], ...]
    size: float
    seconds: float


def untrained(recipe: Recipe) -> Recipe:
    """Return the recipe without the trainings after its baseline, and without what rests on them.

    What is cut and quantized has the same shapes, so that it is as fast and as small.
    """
    before = recipe.steps[: recipe.baseline_at]
    after = [
        _untrained(s) for s in recipe.steps[recipe.baseline_at :] if not isinstance(s, Finetune)
    ]
    return recipe.model_copy(update={"steps": (*before, *after)})


def _untrained(step: Any) -> Any:
    if isinstance(step, Prune):
        learns = step.criterion in LEARNERS
        changes: dict[str, Any] = {"finetune": None, "rounds": 1, "max_drop": None}
        changes |= {"max_perplexity_ratio": None}
        return step.model_copy(update=changes | ({"criterion": INSTEAD} if learns else {}))
    if isinstance(step, Quantize):
        return step.model_copy(update={"max_drop": None, "max_perplexity_ratio": None})
    return step


def same_but_for_cuts(first: Recipe, second: Recipe) -> bool:
    """Whether two recipes are trained and quantized alike."""
    return _without_cuts(first) == _without_cuts(second)


def _without_cuts(recipe: Recipe) -> list[Any]:
    return [step.finetune if isinstance(step, Prune) else step for step in recipe.steps]


def foresee(work: Work, recipe: Recipe) -> Foreseen:
    """Return what can be said of a candidate without training it."""
    lean = untrained(recipe)
    here = work.of(lean)

    def make(_: Path) -> dict[str, Any]:
        artifacts = compress(here)
        baseline, last = artifacts[recipe.baseline_at], artifacts[-1]
        bench = prices.bench(here, "selection")
        first, this = (stages.running_of(here, each) for each in (baseline, last))
        folders = {first.digest: first.folder, this.digest: this.folder}
        latencies = measuring.together(bench, folders).latencies
        return {
            "speedups": [
                list(asdict(speed.ratio(before, after)).values())
                for before, after in zip(
                    latencies[first.digest], latencies[this.digest], strict=True
                )
            ],
            "size": stages.size_bytes(last.entry.folder) / stages.size_bytes(baseline.entry.folder),
            "divergence": _divergence(here, baseline, artifacts),
        }

    about = here.make("foreseen", _key(here, lean), make).about
    return Foreseen(
        tuple(tuple(each) for each in about["speedups"]),
        about["size"],
        about["divergence"],
        about["seconds"],
    )


def _divergence(work: Work, baseline: Artifact, artifacts: Sequence[Artifact]) -> float | None:
    last = [artifact for artifact in artifacts if artifact.format == "torch"][-1]
    if "calibration" not in work.rows or (last.step and last.step["step"] == "quantize"):
        return None
    model, uncut = (checkpoint.from_pretrained(each.entry.folder) for each in (last, baseline))
    return divergence(model, uncut, list(schedules.held_out(work)))


def screen(work: Work, recipe: Recipe, share: float) -> Screened:
    """Return what a candidate comes to on a share of the selection split."""
    here = work.of(recipe)

    def make(_: Path) -> dict[str, Any]:
        artifacts = compress(here)
        bench = _part(prices.bench(here, "selection"), share, recipe.seed)
        both = [
            stages.running_of(here, each) for each in (artifacts[recipe.baseline_at], artifacts[-1])
        ]
        before, after = (measuring.alone(bench, each.folder, each.digest).outcomes for each in both)
        checks = quality.check_scores(
            recipe.budget, work.metric, before.columns, after.columns, recipe.budget.confidence
        )
        scores = (metrics.score(work.metric, each.columns) for each in (before, after))
        return {
            "lost": metrics.lost(work.metric, *scores),
            "checks": [asdict(check) for check in checks],
        }

    about = here.make("screened", _key(here, recipe) | {"share": share}, make).about
    return Screened(about["lost"], _checks(about["checks"]), about["seconds"])


def _part(bench: Bench, share: float, seed: int) -> Bench:
    """Return a bench with a share of the examples, in random order, at least one."""
    count = max(1, round(share * len(bench.examples)))
    order = np.random.default_rng(seed).permutation(len(bench.examples))[:count]
    examples = [bench.examples[at] for at in order]
    return replace(bench, examples=examples, evidence=f"{bench.evidence} {share} {seed}")


def measure(work: Work, recipe: Recipe) -> Measured:
    """Return what a candidate comes to on the selection split, judged as the gate judges."""
    here = work.of(recipe)

    def make(_: Path) -> dict[str, Any]:
        artifacts = compress(here)
        both = [artifacts[recipe.baseline_at], artifacts[-1]]
        found = stages.measure(here, both, "selection")
        evidence = Evidence(
            found.baseline,
            found.candidate,
            found.stages[0],
            found.stages[-1],
            here.labels,
            dedicated=recipe.target.dedicated,
        )
        first, last = found.stages
        return {
            "score": last.score.value,
            "lost": metrics.lost(work.metric, first.score.value, last.score.value),
            "checks": [asdict(check) for check in gate.checks(_own(recipe.budget), evidence)],
            "speedups": [list(asdict(load.speedup).values()) for load in last.loads],
            "size": last.size_bytes / first.size_bytes,
        }

    about = here.make("tried", _key(here, recipe), make).about
    return Measured(
        about["score"],
        about["lost"],
        _checks(about["checks"]),
        tuple(tuple(each) for each in about["speedups"]),
        about["size"],
        about["seconds"],
    )


def _own(budget: Budget) -> Budget:
    """Return the budget without slices and release, which are of the gate split alone."""
    return budget.model_copy(update={"regression": None, "slices": None})


def _checks(found: Sequence[Mapping[str, Any]]) -> tuple[Check, ...]:
    return tuple(Check(**check) for check in found)


def _key(work: Work, recipe: Recipe) -> dict[str, Any]:
    described = recipe.model_dump(mode="json")
    return {
        "model": work.identity,
        "recipe": {name: described[name] for name in ("steps", "baseline", "budget", "seed")},
        "data": {name: work.evidence(name) for name in work.rows if name != "gate"},
        "target": work.described()["target"],
        "machine": work.machine.identity(),
    }
