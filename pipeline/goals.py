"""Cut until a model costs what it may: every layer to a level of its own.

A knapsack chooses levels (levels.py) by what they lose, within what they cost (costs.py); costs are
put right on the model that it chooses first, and what is cut in the end is priced as a whole. A
search then goes by the divergence of the whole model from the dense one. Whole layers go greedily.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Self

from transformers import PreTrainedModel

from benchmarks.accuracy import Track, silent
from pipeline import allocation, costs, depth, levels, pruning, selfcheck, structure, surgery
from pipeline.calibration import Batch
from pipeline.costs import Costs, Price
from pipeline.distillation import divergence
from pipeline.levels import Level
from pipeline.pruning import Choice
from pipeline.structure import Group, Kind

ALLOCATIONS: Final = 2
"""So often at most levels are searched for: again if the model is dearer than the budget."""
CLOSE: Final = 0.02
"""It is not if it is within this share of the budget: times are no better known."""


@dataclass(frozen=True)
class Reached:
    """What was cut, the costs of the dense model and of this one, and divergences.

    The costs are priced, each model as a whole. `divergence` is KL(dense || pruned) on held-out
    data, in nats: `(first allocation, searched)`. `layers` are those that went as a whole.
    """

    choice: Choice
    dense_cost: float
    predicted_cost: float
    divergence: tuple[float, float]
    layers: tuple[str, ...] = ()


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
    layers: bool = False,
    data: Callable[[], Iterable[Batch]],
    held_out: Sequence[Batch],
    total: int,
    keep: Callable[[Callable[[Path], None]], Path] | None = None,
    track: Track = silent,
) -> Reached:
    """Cut a model in place until its cost is within the budget.

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
        layers: whole layers may go, too: one after the other, the one that is missed least, as long
            as what is left can then be cut to the budget with less divergence.
        data: gives the calibration batches with labels, anew each time; `total` of them.
        held_out: batches on which the search compares outputs with the dense model's.
        total: number of batches.
        keep: returns the folder into which what it is given has written the levels, now or before;
            without it they are gone afterwards.
        track: shows progress.

    Raises:
        FloatingPointError: a loss or a divergence is not finite.
        OutOfReach: the budget is below what is left when all units are gone.
        ValueError: the model cannot be cut, a reader has no bias that could be repaired, or the
            data have no labels.
    """
    selfcheck.ensure(model)
    groups = [g for g in structure.groups(model) if g.kept and g.kind in kinds]
    pruning.refuse_repair(groups, repair)
    counts = [levels.counts(group, multiple) for group in groups]
    priced = costs.of_levels(model, groups, counts, price)
    allowed = budget(priced.dense)
    priced.refuse(allowed)
    with tempfile.TemporaryDirectory(prefix="secateur-") as beside:
        make = partial(
            levels.make,
            model,
            groups,
            counts,
            criterion=criterion,
            repair=repair,
            seed=seed,
            data=data,
            total=total,
            track=track,
        )
        if keep is None:
            make(Path(beside))
        known = levels.read(Path(beside) if keep is None else keep(make))
        made, errors = known.levels, known.errors
        inside = _inside(model, groups) if layers else {}
        spared = costs.of_layers(priced, model, inside, price)
        with _Trial(model, groups, made, held_out) as trial:
            plan = _Plan(
                model, groups, counts, priced, errors, inside, spared, price, trial, seed, track
            )
            found, reached = _decide(plan, allowed, searched)
        removed, repairs = _cut(model, groups, made, found, inside)
    return Reached(
        Choice(
            {g.path: s.tolist() for g, s in zip(groups, known.scores, strict=True)},
            removed,
            repairs,
            {group.path: list(group.kept) for group in groups},
        ),
        priced.dense,
        reached,
        (found.losses[0], min(found.losses)),
        found.gone,
    )


@dataclass(frozen=True)
class _Found:
    """A level of every group, the layers that go as a whole, and the divergences seen."""

    levels: tuple[int, ...]
    gone: tuple[str, ...]
    losses: Sequence[float]


@dataclass(frozen=True)
class _Plan:
    """What levels and layers are chosen by; see `reach`.

    `inside` are the places of the groups in each layer that may go, `spared` what such a layer
    costs beside its units.
    """

    model: PreTrainedModel
    groups: Sequence[Group]
    counts: Sequence[Sequence[int]]
    costs: Costs
    errors: Sequence[allocation.Floats]
    inside: Mapping[str, Sequence[int]]
    spared: Mapping[str, float]
    price: Price
    trial: "_Trial"
    seed: int
    track: Track

    def allocate(self, within: float, gone: tuple[str, ...], searched: int = 0) -> _Found:
        """Return the best levels without these layers, by so many steps of the search."""
        with_layers = {at for name in gone for at in self.inside[name]}
        stay = [at for at in range(len(self.groups)) if at not in with_layers]
        losses: list[float] = []

        def whole(chosen: tuple[int, ...]) -> tuple[int, ...]:
            of_group = dict(zip(stay, chosen, strict=True))
            return tuple(of_group.get(at, len(c) - 1) for at, c in enumerate(self.counts))

        def loss(chosen: tuple[int, ...]) -> float:
            losses.append(self.trial.divergence(whole(chosen), gone))
            return losses[-1]

        fixed = self.costs.fixed - sum(self.spared[name] for name in gone)
        steps = range(searched)
        best = allocation.search(
            [self.costs.levels[at] for at in stay],
            [self.errors[at] for at in stay],
            max(within - fixed, 0.0),
            loss,
            steps=self.track(steps, "searching levels", searched) if searched else steps,
            seed=self.seed,
        )
        assert best is not None  # to cut everything is within the budget
        return _Found(whole(best), gone, losses)

    def cost(self, found: _Found) -> float:
        """Return the sum of what is priced by levels."""
        return self.costs.of(found.levels) - sum(self.spared[name] for name in found.gone)

    def true_cost(self, found: _Found) -> float:
        """Return what such a model costs, priced as a whole."""
        left = [c[at] for c, at in zip(self.counts, found.levels, strict=True)]
        name = "-".join(map(str, ["left", *left, *found.gone]))
        made = partial(costs.variant, self.model, self.groups, left, found.gone)
        priced = self.price({costs.DENSE: lambda: self.model, name: made})
        return self.costs.dense * priced[name] / priced[costs.DENSE]


def _decide(plan: _Plan, allowed: float, searched: int) -> tuple[_Found, float]:
    """Return levels and layers, and what they cost: within the budget, if two searches do."""
    best = plan.allocate(allowed, ())
    gone: tuple[str, ...] = ()
    while plan.inside and (least := plan.trial.next_layer(gone)) and least[1] < best.losses[0]:
        gone = *gone, least[0]
        tried = plan.allocate(allowed, gone)
        best = tried if tried.losses[0] < best.losses[0] else best
    # Measured costs do not quite add up, and noise in them is taken for cost.
    reached = plan.true_cost(best)
    within = allowed - (reached - plan.cost(best))
    for _ in range(ALLOCATIONS):
        best = plan.allocate(within, best.gone, searched)
        reached = plan.true_cost(best)
        if reached <= (1 + CLOSE) * allowed:
            break
        within -= reached - allowed
    return best, reached


def _cut(
    model: PreTrainedModel,
    groups: Sequence[Group],
    levels: Sequence[Sequence[Level]],
    found: _Found,
    inside: Mapping[str, Sequence[int]],
) -> tuple[dict[str, list[int]], dict[str, tuple[float, float]]]:
    """Cut to what was found; return removed units and repair errors, but of layers that go."""
    removed, repairs = {}, {}
    with_layers = {at for name in found.gone for at in inside[name]}
    for place, (group, of_group, at) in enumerate(zip(groups, levels, found.levels, strict=True)):
        level = of_group[at]
        if place in with_layers or len(level.places) == len(group.kept):
            continue
        units = set(range(len(group.kept))) - set(level.places.tolist())
        removed[group.path] = [group.kept[unit] for unit in sorted(units)]
        repairs[group.path] = (level.unrepaired, level.error)
        pruning.cut_and_write(model, group, level.places, level.weight())
    surgery.cut_layers(model, found.gone)
    return removed, repairs


def _inside(model: PreTrainedModel, groups: Sequence[Group]) -> dict[str, list[int]]:
    """Return the places of the groups that lie in each layer that may go."""
    depth.refuse_layers(model)
    found = {}
    for name, block in depth.blocks(model).items():
        modules = set(block.modules())
        found[name] = [at for at, group in enumerate(groups) if group.module in modules]
    return found


class _Trial:
    """Tries levels on the model without cutting it: what is gone is columns of zeros."""

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Sequence[Group],
        levels: Sequence[Sequence[Level]],
        held_out: Sequence[Batch],
    ) -> None:
        self._model, self._groups, self._levels = model, groups, levels
        self._held_out = held_out
        self._dense = copy.deepcopy(model)
        self._whole = [pruning.reader(group).clone() for group in groups]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def divergence(self, chosen: tuple[int, ...], gone: Sequence[str] = ()) -> float:
        """Return KL(dense || model at these levels without these layers), in nats."""
        for group, of_group, at in zip(self._groups, self._levels, chosen, strict=True):
            pruning.write_reader(group, of_group[at].masked(group))
        found = depth.candidates(self._model)
        with depth.without(found[name] for name in gone):
            return divergence(self._model, self._dense, self._held_out)

    def next_layer(self, gone: Sequence[str]) -> tuple[str, float] | None:
        """Return the layer that is missed least beside those that are gone; see `depth`."""
        self._restore()
        return depth.next_layer(self._model, self._dense, gone, self._held_out)

    def _restore(self) -> None:
        for group, weight in zip(self._groups, self._whole, strict=True):
            pruning.write_reader(group, weight)
