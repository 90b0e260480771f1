"""What the levels of groups cost, from the costs of a few models.

A price gives the costs of models by their names, in milliseconds, multiply-adds or parameters. It
is asked for models in which all groups of a shape are at a level; costs are taken to add up.

L levels of a group.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from transformers import PreTrainedModel

from pipeline import structure, surgery
from pipeline.allocation import Floats
from pipeline.structure import Group

PRICED: Final = (0.75, 0.5, 0.25, 0.1, 0.0)
"""The shares of a group's units at which costs are found; between them they are interpolated."""
DENSE: Final = "dense"

Variants = Mapping[str, Callable[[], PreTrainedModel]]
Price = Callable[[Variants], Mapping[str, float]]


class OutOfReach(ValueError):
    """No cut makes the model as cheap as it should be."""


@dataclass(frozen=True)
class Costs:
    """What the levels of each group cost, arrays `(L,)`, and the model with all of its units."""

    levels: Sequence[Floats]
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


def of_levels(
    model: PreTrainedModel,
    groups: Sequence[Group],
    counts: Sequence[Sequence[int]],
    price: Price,
) -> Costs:
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
            variants[f"{name}-{count}"] = partial(variant, model, of_shape, [count] * len(of_shape))
    found = price(variants)
    costs = []
    for shape, of_group in zip(shapes, counts, strict=True):
        known = [found[f"{names[shape]}-{count}"] for count in priced[shape]]
        each = (np.array([*known, found[DENSE]]) - known[0]) / shapes.count(shape)
        rising = np.maximum.accumulate(np.maximum(each, 0))
        costs.append(np.interp(of_group, [*priced[shape], shape[1]], rising))
    return Costs(costs, found[DENSE])


def of_layers(
    costs: Costs, model: PreTrainedModel, inside: Mapping[str, Sequence[int]], price: Price
) -> dict[str, float]:
    """Return what a layer costs beside its units, never less than nothing; alike in a stack."""
    stacks: dict[str, str] = {}
    for name in inside:
        stacks.setdefault(name.rpartition(".")[0], name)
    if not stacks:
        return {}
    made = {name: partial(variant, model, (), (), (name,)) for name in stacks.values()}
    found = price({DENSE: lambda: model, **made})
    of_stack = {
        stack: costs.dense * (1 - found[name] / found[DENSE])
        - sum(float(costs.levels[at][0]) for at in inside[name])
        for stack, name in stacks.items()
    }
    return {name: max(of_stack[name.rpartition(".")[0]], 0.0) for name in inside}


def variant(
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
