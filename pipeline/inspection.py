"""What a model is made of, and what of it can be cut: from its configuration, without its weights.

The model is built on no device (`meta`), so that a model of any size is looked at in seconds;
multiply-adds are counted by running it there.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import PreTrainedModel

from benchmarks.accuracy import Track, silent
from pipeline import (
    checkpoint,
    counting,
    parts,
    pruning,
    schedules,
    selfcheck,
    steps,
    structure,
    surgery,
)
from pipeline.checkpoint import ModelError
from pipeline.criteria import CRITERIA
from pipeline.masks import LEARNERS
from pipeline.reading import RecipeError
from pipeline.recipe import Recipe
from pipeline.settings import Prune
from pipeline.work import Work


@dataclass(frozen=True)
class Layer:
    """The units of an attention or an FFN: those that are left, and those that there were.

    `name` is the path by which they are cut. Heads are key/value heads with their queries;
    `queries` are query heads.
    """

    name: str
    heads: tuple[int, int] | None
    queries: tuple[int, int] | None
    neurons: tuple[int, int] | None


@dataclass(frozen=True)
class Depth:
    """The layers of a stack: how many are left of how many, and which have to stay and why."""

    name: str
    left: int
    of: int
    stays: str


@dataclass(frozen=True)
class Inspection:
    """`parameters` and `multiply_adds` by part; the latter for one input of `sequence` tokens.

    `refusal` says why nothing can be cut, `uncounted` why the multiply-adds are not known; else
    they are empty.
    """

    kind: str
    family: str
    sequence: int
    parameters: dict[str, int]
    multiply_adds: dict[str, int] | None
    stacks: list[Depth]
    layers: list[Layer]
    refusal: str
    uncounted: str


def inspect(source: str | Path, sequence: int = 128) -> Inspection:
    """Return what a model folder or hub id is made of.

    Raises:
        ModelError: no such model.
    """
    model = checkpoint.without_weights(source)
    refusal, uncounted, groups, multiply_adds = "", "", [], None
    try:
        selfcheck.ensure(model)
        groups = structure.groups(model)
    except ValueError as error:
        refusal = str(error)
    known = parts.places(model)
    sequence = min(sequence, getattr(model.config, "max_position_embeddings", None) or sequence)
    try:
        multiply_adds = _multiply_adds(model, known, sequence)
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        # Its inputs cannot be made up, or its forward asks for values that no shape tells.
        uncounted = checkpoint.first_line(error)
    return Inspection(
        kind=type(model).__name__,
        family=model.config.model_type,
        sequence=sequence,
        parameters=parts.parameters(model, known),
        multiply_adds=multiply_adds,
        stacks=[] if refusal else _depths(model),
        layers=_layers(groups),
        refusal=refusal,
        uncounted=uncounted,
    )


def head_scores(recipe: Recipe, *, track: Track = silent) -> dict[str, list[float]]:
    """Return the score of every head, by attention, on the recipe's calibration examples.

    The criterion is that of the recipe's first prune step, or what a prune step has by default.

    Raises:
        ModelError: the model is not there, cannot be cut, or was not trained for the task.
        DataError: the data are not what the recipe says.
    """
    prunes = [step for step in recipe.steps if isinstance(step, Prune)]
    criterion = (prunes[0] if prunes else Prune(step="prune", heads=0.5)).criterion
    if criterion in LEARNERS:
        raise RecipeError(
            f"criterion: found {criterion}, which learns while the model trains, expected one of"
            f" {sorted(CRITERIA)} to score heads without training"
        )
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        work = Work(recipe, Path(folder), fresh=False, track=track)
        if not work.has_head:
            raise ModelError(
                f"{recipe.model.source}: found no model trained for {recipe.task.kind}, expected"
                " one to score heads; train it first, and name its folder"
            )
        model = checkpoint.from_pretrained(steps.original(work).entry.folder)
        selfcheck.ensure(model)
        groups = [g for g in structure.groups(model) if g.kind == "heads" and g.kept]
        data, total = schedules.calibration_batches(work)
        options: dict[str, Any] = {"total": total, "track": track}
        known = pruning.gather(model, groups, criterion, data, seed=recipe.seed, **options)
        found = pruning.score(model, groups, criterion, known, data, **options)
        return {path: of_group.tolist() for path, of_group in found.items()}


def draw(scores: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write a heat map of the scores, an attention a row; its format is the file's ending.

    Raises:
        ValueError: the ending is of no format that can be drawn.
    """
    longest = max(map(len, scores.values()))
    figure = Figure(figsize=(2.5 + 0.55 * longest, 1.2 + 0.4 * len(scores)), layout="constrained")
    axes = figure.add_subplot()
    table = [
        [*of_group, *[float("nan")] * (longest - len(of_group))] for of_group in scores.values()
    ]
    image = axes.imshow(table, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set_xticks(range(longest))
    axes.set_xlabel("head")
    figure.colorbar(image, label="score: the lowest are cut first")
    figure.savefig(path)


def _multiply_adds(model: PreTrainedModel, known: dict[str, str], sequence: int) -> dict[str, int]:
    found = dict.fromkeys(parts.PARTS, 0)
    for name, count in counting.multiply_adds(model, sequence).items():
        found[parts.part_of(name, known) if name else parts.PARTS[-1]] += count
    return found


def _depths(model: PreTrainedModel) -> list[Depth]:
    cut, found = structure.record(model)["layers"], []
    for stack, layers in structure.stacks(model):
        of = cut.get(stack.layers, {}).get("of", len(layers))
        bound = surgery.why_all_stay(model, stack)
        stays = f"all stay: {bound}" if bound else ""
        if stack.first and not bound:
            stays = f"layer 0 stays: {stack.first}"
        found.append(Depth(stack.layers, len(layers), of, stays))
    return found


def _layers(groups: list[structure.Group]) -> list[Layer]:
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    for group in groups:
        rows.setdefault(group.path, {})[group.kind] = len(group.kept), group.of
    return [
        Layer(name, found.get("heads"), found.get("queries"), found.get("neurons"))
        for name, found in rows.items()
    ]
