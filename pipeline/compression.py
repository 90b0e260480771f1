"""The steps of a recipe, done: a `for` over them, and a `match` on what each is.

Every step takes an artifact and gives an artifact, through the store.
"""

from collections.abc import Sequence

from pipeline import schedules, steps
from pipeline.settings import Export, Finetune, Prune, Quantize, trained
from pipeline.work import Artifact, Work


def compress(work: Work) -> list[Artifact]:
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
