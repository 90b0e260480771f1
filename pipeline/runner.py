"""`run`: a recipe in, an artifact and its report out.

The pipeline is a `for` over the steps and a `match` on what each is. Every step takes an artifact
and gives an artifact, through the store, so that a run that was killed goes on where it was. Then
all artifacts are measured on the target, and the gate judges the last against the baseline.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from benchmarks.accuracy import Track, silent
from exporters import tensorrt
from pipeline import artifact, bnb, ci, gate, judging, openers, processes, schedules, sources, steps
from pipeline.page import page
from pipeline.recipe import Recipe
from pipeline.report import Report, markdown
from pipeline.settings import Export, Finetune, Prune, Quantize, trained
from pipeline.stages import measure
from pipeline.store import publish, withdraw
from pipeline.work import Artifact, Work
from pipeline.writing import write_text


def run(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
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
        track: shows progress.

    Raises:
        RecipeError: the recipe is wrong.
        DataError: the data are not what the recipe says.
        ModelError: the model is missing, damaged, or not fit for the task.
        Unavailable, NotHere, MissingDependency: this machine lacks the target or a package.
        WorkerError, TrainingError, ExportError, QuantizationError, OSError: a stage failed.
    """
    if output is None:
        output = default_output("recipe.yaml" if isinstance(recipe, Recipe) else recipe)
    output = Path(output)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.from_yaml(recipe)
    check_target(recipe)
    work = Work(recipe, output, fresh=fresh, track=track)
    artifacts = _compress(work)[recipe.baseline_at :]
    measured = measure(work, artifacts)
    verdict = gate.judge(
        gate.checks(
            recipe.budget,
            work.metric,
            measured.baseline.columns,
            measured.candidate.columns,
            measured.stages,
        )
    )
    last = artifacts[-1]
    passed = verdict.outcome == "pass"
    report = Report(
        recipe=work.described(),
        machine=asdict(work.machine) | measured.pressure,
        data={
            "source": recipe.task.data,
            "examples": {name: len(rows) for name, rows in work.rows.items()},
            "fingerprints": {name: work.evidence(name) for name in work.rows},
            "labels": work.labels,
        },
        baseline=recipe.baseline,
        stages=measured.stages,
        verdict=verdict,
        artifact=str(output / "artifact" if passed else last.entry.folder),
    )
    if not processes.leads():
        return report
    publish(
        partial(judging.keep, baseline=measured.baseline, candidate=measured.candidate),
        output / judging.EVIDENCE,
        {},
    )
    report = replace(report, evidence=judging.hashes(output / judging.EVIDENCE))
    text = report.to_json()
    content = json.loads(text)
    files = {"report.json": text, "report.md": markdown(content), "report.html": page(content)}
    files["junit.xml"] = ci.junit(content)
    if passed:
        about = {
            "recipe": artifact.without_paths(report.recipe),
            "source": sources.identity(work.source, recipe.model.revision),
            "machine": report.machine,
            "verdict": asdict(verdict),
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


def check(recipe: Recipe, *, track: Track = silent) -> dict[str, int]:
    """Return the number of examples of every split, after all that is checked before a step.

    Raises:
        DataError: the data are not what the recipe says.
        ModelError: the model is missing, or not fit for the task.
        Unavailable, NotHere, MissingDependency: this machine lacks the target or a package.
    """
    check_target(recipe)
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        work = Work(recipe, Path(folder), fresh=False, track=track)
    return {name: len(rows) for name, rows in work.rows.items()}


def check_target(recipe: Recipe) -> None:
    """Refuse a target that is not here.

    Raises:
        Unavailable: no CUDA device where one is asked for.
        MissingDependency: onnxruntime, TensorRT or bitsandbytes is asked for and not installed.
        NotHere: TensorRT cannot build on this machine what is asked for.
    """
    target = recipe.target
    for step in recipe.steps:
        if isinstance(step, Export) and step.format == "tensorrt":
            tensorrt.available(steps.engine_settings(step))
        if isinstance(step, Quantize) and step.in_torch:
            bnb.library()
    openers.check(target.runtime, target.device)


def _compress(work: Work) -> list[Artifact]:
    """Do the steps, and return all artifacts, the untouched model first."""
    artifacts = [steps.original(work)]
    for step, name in zip(work.recipe.steps, work.recipe.stage_names, strict=True):
        before = artifacts[-1]
        described = step.model_dump(mode="json")
        kind, graph = before.format, None
        match step:
            case Prune():
                entry = schedules.prune(work, step, before, _teacher(step, artifacts))
            case Finetune():
                entry = schedules.finetune(work, step, before, _teacher(step, artifacts))
            case Quantize() if step.in_torch:
                entry = steps.quantize_in_torch(work, step, before)
            case Quantize():
                entry, kind = steps.quantize(work, step, before), "onnx"
            case Export(format="tensorrt"):
                (entry, graph), kind = steps.engine(work, step, before), "tensorrt"
            case Export():
                entry, kind = steps.export(work, before), "onnx"
        artifacts.append(Artifact(name, described, kind, entry, graph))
    return artifacts


def _teacher(step: Prune | Finetune, artifacts: Sequence[Artifact]) -> Artifact | None:
    training = trained(step)
    name = training.teacher if training is not None else None
    return next((artifact for artifact in artifacts if artifact.name == name), None)
