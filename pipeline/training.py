"""A recipe's training settings carried out: on the run's data, with its teacher, resumable."""

from pathlib import Path
from typing import Any, Final

from torch import nn
from transformers import PreTrainedModel

from benchmarks import metrics
from benchmarks.accuracy import evaluate
from benchmarks.worker import InProcess
from pipeline import checkpoint, processes
from pipeline.distillation import Teacher
from pipeline.finetuning import Learner, Trained, finetune
from pipeline.settings import Training
from pipeline.store import kept
from pipeline.work import Artifact, Work

TURN: Final = 1_000_003
"""So far apart are the seeds of turns: epochs count up from a seed."""


def train(
    work: Work,
    settings: Training,
    model: PreTrainedModel,
    teacher: Artifact | None,
    *,
    learner: Learner | None = None,
    turn: int = 0,
    unfinished: Path | None = None,
) -> Trained:
    """Train a model in place; with the unfinished entry's folder, so that a kill loses little.

    In another `turn` other windows are seen, in another order.
    """
    imitated = None
    if teacher is not None:
        imitated = Teacher(
            checkpoint.from_pretrained(teacher.entry.folder),
            settings.temperature,
            settings.task_weight,
            settings.hidden_weight,
        )
    trained = finetune(
        model,
        work.examples("train"),
        work.padding,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        precision=settings.precision,
        freeze_embeddings=settings.freeze_embeddings,
        teacher=imitated,
        learner=learner,
        evaluate=(lambda: score(work, model)) if settings.patience else None,
        evaluations=settings.evaluations,
        patience=settings.patience or 1,
        seed=work.recipe.seed + TURN * turn,
        device=work.recipe.target.device,
        checkpoint=kept(unfinished) if unfinished else None,
        track=work.track,
    )
    nn.Module.to(model, "cpu")
    return trained


def score(work: Work, model: PreTrainedModel) -> float:
    """Return the score on the selection split, turned round if lower is better."""
    worker = InProcess(checkpoint.predictor(model))
    outcomes = evaluate(worker, work.task, work.examples("selection"), work.padding)
    found = metrics.score(work.metric, outcomes.columns)
    return found if metrics.METRICS[work.metric].higher_is_better else -found


def key(work: Work, settings: Training, teacher: Artifact | None, turn: int = 0) -> dict[str, Any]:
    """Return what a training depends on, beside the model."""
    return {
        "training": settings.model_dump(mode="json"),
        "teacher": teacher.entry.digest if teacher else None,
        "train": work.evidence("train"),
        "selection": [work.metric, work.evidence("selection")] if settings.patience else None,
        "seed": work.recipe.seed,
        "turn": turn,
        "device": work.recipe.target.device,
        "processes": processes.count(),
        "sharded": processes.sharded(),
    }


def details(trained: Trained) -> dict[str, Any]:
    """Return what a report says of a training."""
    found: dict[str, Any] = {"mean_loss": trained.loss, "step": trained.step}
    if trained.scores:
        found["selection"] = {str(step): value for step, value in trained.scores.items()}
    return found
