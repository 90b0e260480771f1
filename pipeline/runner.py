"""`run`: a recipe in, an artifact and its report out.

The steps are done (compression.py), all artifacts are measured on the target, and the gate judges
the last against the baseline. All of it goes through the store, so that a run that was killed goes
on where it was.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import energy
from benchmarks.accuracy import Track, silent
from benchmarks.machine import Unavailable
from exporters import tensorrt
from pipeline import (
    artifact,
    bnb,
    ci,
    gate,
    gptq,
    judging,
    ledger,
    measuring,
    openers,
    processes,
    steps,
)
from pipeline.compression import compress
from pipeline.evidence import Evidence
from pipeline.page import page
from pipeline.recipe import Recipe
from pipeline.report import Report, Stage, markdown
from pipeline.settings import Export, Quantize, trained
from pipeline.stages import measure
from pipeline.store import publish, withdraw
from pipeline.work import Work
from pipeline.writing import write_text


def run(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    store: str | Path | None = None,
    track: Track = silent,
) -> Report:
    """Run a recipe, and return its report.

    Of several processes, as torchrun starts them, the first one writes; all return the report.

    Writes below `output` (`runs/<recipe>` unless given): `stages/`, from which a later run resumes,
    `evidence/`, `report.json`, `report.md`, `report.html`, `junit.xml`, and, if the verdict is a
    pass, `artifact/`.

    Args:
        recipe: a recipe, or the path of one.
        output: the folder for everything that is written.
        fresh: do every step again, whatever the store holds.
        store: a folder in place of `stages/`, which runs with outputs of other names may share.
        track: shows progress.

    Raises:
        RecipeError: the recipe is wrong.
        DataError: the data are not what the recipe says.
        ModelError: the model is missing, damaged, or not fit for the task.
        Unavailable, NotHere, MissingDependency: this machine lacks the target or a package.
        EvidenceError: what was measured is not fit to judge on.
        WorkerError, TrainingError, ExportError, QuantizationError, OSError: a stage failed.
    """
    if output is None:
        output = default_output("recipe.yaml" if isinstance(recipe, Recipe) else recipe)
    output = Path(output)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.from_yaml(recipe)
    check_target(recipe)
    shared = None if store is None else Path(store)
    work = Work(recipe, output, fresh=fresh, track=track, store=shared)
    if recipe.budget.regression is not None:  # that it is there is known before the first step
        judging.read(judging.report_path(Path(recipe.budget.regression.report)))
    artifacts = compress(work)[recipe.baseline_at :]
    measured = measure(work, artifacts)
    here = judging.place({"machine": asdict(work.machine), "recipe": work.described()})
    evidence = Evidence(
        measured.baseline,
        measured.candidate,
        measured.stages[0],
        measured.stages[-1],
        work.labels,
        work.slices,
        dedicated=recipe.target.dedicated,
        places=(here, here),
    )
    released = judging.against(recipe.budget, evidence)
    verdict = gate.judge(gate.checks(recipe.budget, evidence, released))
    last = artifacts[-1]
    passed = verdict.outcome == "pass"
    report = Report(
        recipe=work.described(),
        machine=asdict(work.machine) | measured.pressure,
        data={
            "source": recipe.task.data,
            "examples": {name: len(rows) for name, rows in work.rows.items()},
            "dropped": work.dropped,
            "fingerprints": {name: work.evidence(name) for name in work.rows},
            "labels": work.labels,
        },
        baseline=recipe.baseline,
        stages=measured.stages,
        verdict=verdict,
        artifact=str(output / "artifact" if passed else last.entry.folder),
        not_measured=_not_measured(measured.stages, recipe.target.device),
    )
    if not processes.leads():
        return report
    publish(partial(judging.keep, evidence=evidence), output / judging.EVIDENCE, {})
    report = replace(
        report,
        evidence=judging.hashes(output / judging.EVIDENCE),
        ledger=ledger.record(output, measured.candidate.ids, measured.digest),
    )
    text = report.to_json()
    content = json.loads(text)
    files = {"report.json": text, "report.md": markdown(content), "report.html": page(content)}
    files["junit.xml"] = ci.junit(content)
    if passed:
        about = {
            "recipe": artifact.without_paths(report.recipe),
            "source": work.identity,
            "machine": report.machine,
            "verdict": asdict(verdict),
            "ledger": report.ledger,
            "measured": measured.stages[-1].details.get("measured"),  # if it is not all of this
        }
        publish(
            lambda folder: artifact.write(folder, work, last, content), output / "artifact", about
        )
    else:
        withdraw(output / "artifact")  # an earlier run's, not this one's
    for name, text in files.items():
        write_text(output / name, text)
    work.store.finish()
    return report


def default_output(recipe: str | Path) -> Path:
    """Return the folder that a recipe's run writes to unless another is named."""
    return Path("runs", Path(recipe).stem)


def _not_measured(stages: Sequence[Stage], device: str) -> dict[str, str]:
    """Return the names of what was measured nowhere, with the reasons."""
    known: set[str] = set()
    for stage in stages:
        for figures in (stage.memory, *map(asdict, stage.loads)):
            known |= {name for name, figure in figures.items() if figure is not None}
    reasons = measuring.reasons(device)
    before = "not when this was measured; it could be now"
    return {name: reason or before for name, reason in reasons.items() if name not in known}


@dataclass(frozen=True)
class Data:
    """The number of examples of every split, of the gate as the model sees them, and its slices.

    `dropped` are those that a split shared with another, or had twice, and lost by `overlap: drop`.
    """

    splits: Mapping[str, int]
    dropped: Mapping[str, int]
    slices: Mapping[str, int]


def check(recipe: Recipe, *, track: Track = silent) -> Data:
    """Return how many examples there are, after all that is checked before a step.

    Raises:
        DataError: the data are not what the recipe says.
        ModelError: the model is missing, or not fit for the task.
        Unavailable, NotHere, MissingDependency: this machine lacks the target or a package.
    """
    check_target(recipe)
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        work = Work(recipe, Path(folder), fresh=False, track=track)
        splits = {name: len(rows) for name, rows in work.rows.items()}
        slices = Counter(value for values in work.slices.values() for value in values)
        return Data(splits | {"gate": len(work.examples("gate"))}, work.dropped, slices)


def check_target(recipe: Recipe) -> None:
    """Refuse a target that is not here.

    Raises:
        Unavailable: no CUDA device, none that computes in bf16, or no sensor of energy, where one
            is asked for.
        MissingDependency: a library that is asked for is not installed.
        NotHere: TensorRT cannot build on this machine what is asked for.
    """
    target = recipe.target
    for step in recipe.steps:
        if isinstance(step, Export) and step.format == "tensorrt":
            tensorrt.available(steps.engine_settings(step))
        if isinstance(step, Quantize) and step.ends_the_chain:
            gptq.require()
        elif isinstance(step, Quantize) and step.in_torch:
            bnb.library()
    openers.check(target.runtime, target.device)
    taught = [trained(step) for step in recipe.steps]
    in_bf16 = any(each and each.precision == "bf16" for each in taught)
    if in_bf16 and target.device == "cuda" and not torch.cuda.is_bf16_supported():
        raise Unavailable("precision: found a GPU without bf16, expected one with; train in fp32")
    if recipe.budget.max_energy is not None:
        counters, reason = energy.counters(target.device)
        if not counters:
            raise Unavailable(f"budget.max_energy: {reason}, expected one; leave the limit out")
