"""Cut until a model costs what it may: every layer to a level of its own.

A group's levels are its units in the order of a criterion, fewer and fewer down to none, each with
its reader repaired. What a level costs is found on models in which all groups of a shape are at
that level, and put right on the model of a first allocation; what is cut in the end is priced as a
whole.

What a level loses is foretold from the calibration data: mean_n <dL_n/dW, W' - W>^2, for the loss
L_n of a window and what the reader W becomes, W', repaired. It is the empirical Fisher information
in the direction of the change, without the terms between groups; where nothing is repaired, it is
that of masks on the units that go (Kwon et al. 2022, https://arxiv.org/abs/2204.09656). A search
then goes by the divergence of the whole model from the dense one. Whole layers go greedily.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from pipeline import allocation, calibration, depth, pruning, selfcheck, structure, surgery
from pipeline.calibration import Batch
from pipeline.criteria import CRITERIA, SWAPS, Evidence
from pipeline.distillation import divergence
from pipeline.pruning import Choice
from pipeline.structure import Group, Kind

PRICED: Final = (0.75, 0.5, 0.25, 0.1, 0.0)
"""The shares of a group's units at which costs are found; between them they are interpolated."""
LEVELS: Final = 12
"""A group has so many levels at most, beside that of all its units."""
DENSE: Final = "dense"
ALLOCATIONS: Final = 2
"""So often at most levels are searched for: again if the model is dearer than the budget."""
CLOSE: Final = 0.02
"""It is not if it is within this share of the budget: times are no better known."""

CHANGED_BYTES: Final = 1 << 30
"""Changes of readers of so many bytes are held at once, or those of one if they are larger."""

Variants = Mapping[str, Callable[[], PreTrainedModel]]
Price = Callable[[Variants], Mapping[str, float]]


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

    def masked(self, group: Group) -> Tensor:
        """Return the reader at this level as wide as it is now, of zeros for what is gone."""
        masked = torch.zeros_like(pruning.reader(group))
        masked[:, pruning.columns(group, self.places)] = self.weight().to(masked.dtype)
        return masked

    def change(self, group: Group) -> Tensor:
        return self.masked(group).float() - pruning.reader(group).float()


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
    counts = [_counts(group, multiple) for group in groups]
    costs = _costs(model, groups, counts, price)
    allowed = budget(costs.dense)
    costs.refuse(allowed)
    known = pruning.gather(model, groups, criterion, data, seed=seed, total=total, track=track)
    scores: dict[str, Tensor] = {}
    levels: list[list[_Level]] = []
    moments = pruning.second_moments(model, groups, data, total=total, track=track)
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        for (group, seen), wanted in track(
            zip(moments, counts, strict=True), "repairing levels", len(groups)
        ):
            evidence = known(group, seen)
            of_units = scores[group.path] = CRITERIA[criterion](evidence)
            files = (Path(folder, f"{len(levels)}-{count}") for count in wanted)
            levels.append(
                [
                    _level(group, gone, seen, repair=repair, file=file)
                    for gone, file in zip(
                        _gone(criterion, evidence, of_units, wanted), files, strict=True
                    )
                ]
            )
        errors = _errors(model, groups, levels, data, total=total, track=track)
        inside = _inside(model, groups) if layers else {}
        spared = _spared(costs, model, inside, price)
        with _Trial(model, groups, levels, held_out) as trial:
            plan = _Plan(
                model, groups, counts, costs, errors, inside, spared, price, trial, seed, track
            )
            found, reached = _decide(plan, allowed, searched)
        removed, repairs = _cut(model, groups, levels, found, inside)
    return Reached(
        Choice({path: s.tolist() for path, s in scores.items()}, removed, repairs),
        costs.dense,
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
    costs: "_Costs"
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
        made = partial(_variant, self.model, self.groups, left, found.gone)
        priced = self.price({DENSE: lambda: self.model, name: made})
        return self.costs.dense * priced[name] / priced[DENSE]


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
    levels: Sequence[Sequence["_Level"]],
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


def _errors(
    model: PreTrainedModel,
    groups: Sequence[Group],
    levels: Sequence[Sequence[_Level]],
    data: Callable[[], Iterable[Batch]],
    *,
    total: int,
    track: Track,
) -> list[allocation.Floats]:
    """Return what the levels of each group lose `(L,)`, never less with fewer units; see above.

    A pass over the data serves as many groups as `CHANGED_BYTES` hold.
    """
    errors: list[allocation.Floats] = []
    both = list(zip(groups, levels, strict=True))
    sizes = [4 * len(of_group) * pruning.reader(group).numel() for group, of_group in both]
    for part in pruning.in_parts(both, sizes, CHANGED_BYTES):
        readers = {group.path: group.reader for group, _ in part}
        changes = {
            group.path: torch.stack([level.change(group) for level in of_group])
            for group, of_group in part
        }
        found = calibration.change_gradients(
            model, readers, changes, data(), total=total, track=track
        )
        for path in readers:
            lost = found[path].double().square().mean(0).numpy()
            errors.append(np.maximum.accumulate(lost))
    return errors


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


def _counts(group: Group, multiple: int) -> list[int]:
    """Return how many units a group has at its levels, all of them first, none last."""
    whole = len(group.kept)
    step = multiple if group.kind == "neurons" else 1
    shares = np.linspace(1, 0, min(LEVELS, whole) + 1)
    rounded = {min(whole, round(share * whole / step) * step) for share in shares}
    return sorted({whole, *rounded, 0})[::-1]


@dataclass(frozen=True)
class _Costs:
    """What the levels of each group cost, arrays `(L,)`, and the model with all of its units."""

    levels: Sequence[allocation.Floats]
    dense: float

    @property
    def fixed(self) -> float:
        """What is left without any unit."""
        return max(self.dense - sum(float(cost[0]) for cost in self.levels), 0.0)

    def of(self, chosen: Sequence[int]) -> float:
        """Return the cost of a model at these levels."""
        each = zip(self.levels, chosen, strict=True)
        return self.fixed + sum(float(cost[at]) for cost, at in each)

    def refuse(self, allowed: float) -> None:
        """Raise OutOfReach if no levels cost as little as is allowed."""
        if allowed < self.fixed:
            raise OutOfReach(
                f"goal: found a cost of {self.fixed:.4g} with no units left, which is"
                f" {self.fixed / self.dense:.3f} of the whole, expected at most {allowed:.4g},"
                f" {allowed / self.dense:.3f} of it; choose a nearer goal"
            )


def _costs(
    model: PreTrainedModel,
    groups: Sequence[Group],
    counts: Sequence[Sequence[int]],
    price: Price,
) -> _Costs:
    """Return what the levels of each group cost.

    Groups of the same shape cost the same, and costs add up.
    """
    shapes = [(g.kind, len(g.kept), structure.by_unit(g).shape[1]) for g in groups]
    names = {shape: f"{shape[0]}-{at}" for at, shape in enumerate(dict.fromkeys(shapes))}
    priced = {shape: sorted({round(share * shape[1]) for share in PRICED}) for shape in names}
    variants: dict[str, Callable[[], PreTrainedModel]] = {DENSE: lambda: model}
    for shape, name in names.items():
        of_shape = [g for g, other in zip(groups, shapes, strict=True) if other == shape]
        for count in priced[shape]:
            variants[f"{name}-{count}"] = partial(
                _variant, model, of_shape, [count] * len(of_shape)
            )
    found = price(variants)
    costs = []
    for shape, of_group in zip(shapes, counts, strict=True):
        known = [found[f"{names[shape]}-{count}"] for count in priced[shape]]
        each = (np.array([*known, found[DENSE]]) - known[0]) / shapes.count(shape)
        rising = np.maximum.accumulate(np.maximum(each, 0))
        costs.append(np.interp(of_group, [*priced[shape], shape[1]], rising))
    return _Costs(costs, found[DENSE])


def _inside(model: PreTrainedModel, groups: Sequence[Group]) -> dict[str, list[int]]:
    """Return the places of the groups that lie in each layer that may go."""
    depth.refuse_layers(model)
    found = {}
    for name, block in depth.blocks(model).items():
        modules = set(block.modules())
        found[name] = [at for at, group in enumerate(groups) if group.module in modules]
    return found


def _spared(
    costs: _Costs, model: PreTrainedModel, inside: Mapping[str, Sequence[int]], price: Price
) -> dict[str, float]:
    """Return what a layer costs beside its units, never less than nothing; alike in a stack."""
    stacks: dict[str, str] = {}
    for name in inside:
        stacks.setdefault(name.rpartition(".")[0], name)
    if not stacks:
        return {}
    made = {name: partial(_variant, model, (), (), (name,)) for name in stacks.values()}
    found = price({DENSE: lambda: model, **made})
    of_stack = {
        stack: costs.dense * (1 - found[name] / found[DENSE])
        - sum(float(costs.levels[at][0]) for at in inside[name])
        for stack, name in stacks.items()
    }
    return {name: max(of_stack[name.rpartition(".")[0]], 0.0) for name in inside}


def _variant(
    model: PreTrainedModel,
    groups: Sequence[Group],
    counts: Sequence[int],
    without: Sequence[str] = (),
) -> PreTrainedModel:
    """Return a copy with so many units left in each of the groups, and without these layers."""
    wanted = {(g.kind, g.key): count for g, count in zip(groups, counts, strict=True)}
    cut = copy.deepcopy(model)
    for group in structure.groups(cut):
        if (group.kind, group.key) in wanted:
            surgery.keep(cut, group, list(group.kept[: wanted[group.kind, group.key]]))
    surgery.cut_layers(cut, without)
    return cut


def _gone(
    criterion: str, evidence: Evidence, scores: Tensor, wanted: Sequence[int]
) -> Iterator[Tensor]:
    """Yield the places that go if so many units are to stay."""
    order = scores.argsort(stable=True)
    for count in wanted:
        lowest = order[: len(scores) - count]
        yield SWAPS[criterion](evidence, lowest) if criterion in SWAPS else lowest


def _level(
    group: Group, gone: Tensor, seen: calibration.Moments, *, repair: str, file: Path
) -> _Level:
    """Return a group without the units at the places `gone`; its reader goes into the file."""
    places = pruning.others(gone, len(group.kept))
    mended = pruning.repaired(group, seen, places, repair)
    weight = pruning.reader(group).double()
    size = weight.shape[1]
    energy = max(float(((weight @ seen.held_out[:size, :size]) * weight).sum()), 1e-30)
    before, after = mended.error_before / energy, mended.error_after / energy
    save_file({"weight": mended.weight.float().contiguous()}, file)
    return _Level(places, file, before, after)
