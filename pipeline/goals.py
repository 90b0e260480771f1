"""Cut until a model costs what it may: every layer to a level of its own.

A group's levels are its units in the order of a criterion, fewer and fewer down to none, each with
its reader repaired. What a level costs is found on models in which all groups of a shape are at
that level; what it loses is the error of the repaired reader, and in the end the divergence of the
whole model from the dense one.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.accuracy import Track, silent
from pipeline import allocation, calibration, pruning, selfcheck, structure, surgery
from pipeline.calibration import Batch
from pipeline.criteria import CRITERIA
from pipeline.distillation import divergence
from pipeline.pruning import Choice
from pipeline.structure import Group, Kind

PRICED: Final = (0.75, 0.5, 0.25, 0.1, 0.0)
"""The shares of a group's units at which costs are found; between them they are interpolated."""
LEVELS: Final = 12
"""A group has so many levels at most, beside that of all its units."""
DENSE: Final = "dense"

Variants = Mapping[str, Callable[[], PreTrainedModel]]
Price = Callable[[Variants], Mapping[str, float]]


@dataclass(frozen=True)
class Reached:
    """What was cut, the costs of the dense model and, as predicted, of this one, and divergences.

    `divergence` is KL(dense || pruned) on held-out data, in nats: `(first allocation, searched)`.
    """

    choice: Choice
    dense_cost: float
    predicted_cost: float
    divergence: tuple[float, float]


class OutOfReach(ValueError):
    """No cut makes the model as cheap as it should be."""


@dataclass(frozen=True)
class _Level:
    """Places that stay, and the relative errors of the reader on held-out data.

    The reader `(O, K)` itself waits in a file: those of all levels are several times the model.
    """

    places: Tensor
    file: Path
    unrepaired: float
    error: float

    def weight(self) -> Tensor:
        return load_file(self.file)["weight"]


def reach(
    model: PreTrainedModel,
    kinds: Sequence[Kind],
    budget: Callable[[float], float],
    price: Price,
    *,
    criterion: str,
    repair: str,
    multiple: int = 1,
    searched: int = 50,
    seed: int = 0,
    data: Callable[[], Iterable[Batch]],
    held_out: Sequence[Batch],
    total: int,
    track: Track = silent,
) -> Reached:
    """Cut a model in place until its predicted cost is within the budget.

    Args:
        model: changed in place.
        kinds: of the units that may go.
        budget: gives the largest cost allowed, from that of the dense model.
        price: gives the costs of models, by their names.
        criterion: a key of `criteria.CRITERIA`: the order in which a group's units go.
        repair: a key of `compensation.REPAIRS`, or `none`.
        multiple: the numbers of neurons left are rounded to a multiple of it.
        searched: the number of steps of the search.
        seed: of the search, and of the criterion `random`.
        data: gives the calibration batches, anew each time; `total` of them.
        held_out: batches on which the search compares outputs with the dense model's.
        total: number of batches.
        track: shows progress.

    Raises:
        OutOfReach: the budget is below what is left when all units are gone.
        ValueError: the model cannot be cut, or a reader has no bias that could be repaired.
    """
    selfcheck.ensure(model)
    groups = [g for g in structure.groups(model) if g.kept and g.kind in kinds]
    pruning.refuse_repair(groups, repair)
    counts = [_counts(group, multiple) for group in groups]
    costs, fixed, dense_cost = _costs(model, groups, counts, price)
    allowed = budget(dense_cost)
    if allowed < fixed:
        raise OutOfReach(
            f"goal: found a cost of {fixed:.4g} with no units left, expected at most"
            f" {allowed:.4g} of {dense_cost:.4g}; choose a nearer goal"
        )
    known = pruning.gather(model, groups, criterion, data, seed=seed, total=total, track=track)
    scores: dict[str, Tensor] = {}
    levels: list[list[_Level]] = []
    moments = pruning.second_moments(model, groups, data, total=total, track=track)
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        for (group, seen), wanted in track(
            zip(moments, counts, strict=True), "repairing levels", len(groups)
        ):
            of_units = scores[group.path] = CRITERIA[criterion](known(group, seen))
            files = (Path(folder, f"{len(levels)}-{count}") for count in wanted)
            levels.append(
                [
                    _level(group, of_units, count, seen, repair=repair, file=file)
                    for count, file in zip(wanted, files, strict=True)
                ]
            )
        errors = [np.array([level.error for level in of_group]) for of_group in levels]
        first: list[float] = []

        with _Trial(model, groups, levels, held_out) as trial:

            def loss(chosen: tuple[int, ...]) -> float:
                first.append(trial.divergence(chosen))
                return first[-1]

            best = allocation.search(
                costs,
                errors,
                allowed - fixed,
                loss,
                steps=track(range(searched), "searching levels", searched),
                seed=seed,
            )
        assert best is not None  # to cut everything is within the budget
        removed, repairs = {}, {}
        for group, of_group, at in zip(groups, levels, best, strict=True):
            level = of_group[at]
            if len(level.places) == len(group.kept):
                continue
            gone = set(range(len(group.kept))) - set(level.places.tolist())
            removed[group.path] = [group.kept[place] for place in sorted(gone)]
            repairs[group.path] = (level.unrepaired, level.error)
            pruning.cut_and_write(model, group, level.places, level.weight())
    predicted = fixed + sum(float(cost[at]) for cost, at in zip(costs, best, strict=True))
    choice = Choice({path: s.tolist() for path, s in scores.items()}, removed, repairs)
    return Reached(choice, dense_cost, predicted, (first[0], min(first)))


class _Trial:
    """Tries levels on the model without cutting it: what is gone is columns of zeros."""

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Sequence[Group],
        levels: Sequence[Sequence[_Level]],
        held_out: Sequence[Batch],
    ) -> None:
        self._model, self._groups, self._levels = model, groups, levels
        self._held_out = held_out
        self._dense = copy.deepcopy(model)
        self._whole = [pruning.reader(group).clone() for group in groups]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for group, weight in zip(self._groups, self._whole, strict=True):
            pruning.write_reader(group, weight)

    def divergence(self, chosen: tuple[int, ...]) -> float:
        """Return KL(dense || model at these levels), the mean over batches, in nats."""
        for group, of_group, at, whole in zip(
            self._groups, self._levels, chosen, self._whole, strict=True
        ):
            masked = torch.zeros_like(whole)
            masked[:, pruning.columns(group, of_group[at].places)] = (
                of_group[at].weight().to(masked.dtype)
            )
            pruning.write_reader(group, masked)
        return divergence(self._model, self._dense, self._held_out)


def _counts(group: Group, multiple: int) -> list[int]:
    """Return how many units a group has at its levels, all of them first, none last."""
    whole = len(group.kept)
    step = multiple if group.kind == "neurons" else 1
    shares = np.linspace(1, 0, min(LEVELS, whole) + 1)
    rounded = {min(whole, round(share * whole / step) * step) for share in shares}
    return sorted({whole, *rounded, 0})[::-1]


def _costs(
    model: PreTrainedModel,
    groups: Sequence[Group],
    counts: Sequence[Sequence[int]],
    price: Price,
) -> tuple[list[allocation.Floats], float, float]:
    """Return what the levels of each group cost, what is left without any, and the dense cost.

    Groups of the same shape cost the same, and costs add up.
    """
    shapes = [(g.kind, len(g.kept), structure.by_unit(g).shape[1]) for g in groups]
    names = {shape: f"{shape[0]}-{at}" for at, shape in enumerate(dict.fromkeys(shapes))}
    priced = {shape: sorted({round(share * shape[1]) for share in PRICED}) for shape in names}

    def variant(shape: tuple[Kind, int, int], count: int) -> PreTrainedModel:
        of_shape = {g.key for g, other in zip(groups, shapes, strict=True) if other == shape}
        cut = copy.deepcopy(model)
        for group in structure.groups(cut):
            if group.key in of_shape and group.kind == shape[0]:
                surgery.keep(cut, group, list(group.kept[:count]))
        return cut

    variants: dict[str, Callable[[], PreTrainedModel]] = {DENSE: lambda: model}
    for shape, name in names.items():
        for count in priced[shape]:
            variants[f"{name}-{count}"] = partial(variant, shape, count)
    found = price(variants)
    costs = []
    for shape, of_group in zip(shapes, counts, strict=True):
        known = [found[f"{names[shape]}-{count}"] for count in priced[shape]]
        each = (np.array([*known, found[DENSE]]) - known[0]) / shapes.count(shape)
        rising = np.maximum.accumulate(np.maximum(each, 0))
        costs.append(np.interp(of_group, [*priced[shape], shape[1]], rising))
    fixed = found[DENSE] - sum(float(cost[0]) for cost in costs)
    return costs, max(fixed, 0.0), found[DENSE]


def _level(
    group: Group, scores: Tensor, count: int, seen: calibration.Moments, *, repair: str, file: Path
) -> _Level:
    """Return a group with its `count` highest-scored units; its reader goes into the file."""
    places = scores.argsort(stable=True)[len(scores) - count :].sort().values
    mended = pruning.repaired(group, seen, places, repair)
    weight = pruning.reader(group).double()
    size = weight.shape[1]
    energy = max(float(((weight @ seen.held_out[:size, :size]) * weight).sum()), 1e-30)
    before, after = mended.error_before / energy, mended.error_after / energy
    save_file({"weight": mended.weight.float().contiguous()}, file)
    return _Level(places, file, before, after)
