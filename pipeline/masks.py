"""What to cut, learnt while the model trains: masks on units, or the movement of their weights.

A mask multiplies the slice of the reader's input that is the unit's, 1 = kept. Every kind of units
has its own target, a share of all its units in the model; the share that goes rises linearly from 0
in the first `RISE` of the training. `scores` rank the units once the training is over, and those
with the lowest are cut; what a mask still was then is left in the reader's columns.

U units of a group.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from pipeline import structure
from pipeline.structure import Group, Kind

RISE: Final = 0.5
RATE: Final = 0.1
"""The learning rate of masks and of the multipliers of their targets."""
LOW, HIGH, SHARPNESS = -0.1, 1.1, 1 / 3
"""The hard concrete distribution is stretched to (LOW, HIGH) and clipped to [0, 1]."""
OPEN: Final = 2.5
"""The logit that a hard concrete mask begins with: it is 1 but for noise."""
COLDEST: Final = 0.05


class Movement:
    """Sums -dL/dW * W over the steps: negative where training draws the weights towards zero.

    Sanh, Wolf and Rush 2020, https://arxiv.org/abs/2005.07683; over all parameters of a unit as in
    Lagunas et al. 2021, https://arxiv.org/abs/2109.04838
    """

    watches: Final = True

    def __init__(self, groups: Sequence[Group], fractions: Mapping[Kind, float]) -> None:
        self._groups = [group for group in groups if fractions.get(group.kind)]
        self._sums = {
            group.path: structure.matrix(group.reader).new_zeros(len(group.kept))
            for group in self._groups
        }

    def options(self) -> list[dict[str, Any]]:
        """Return no parameters: it only looks."""
        return []

    def begin(self, done: float) -> None:
        """Do nothing."""

    def penalty(self) -> Tensor:
        """Return 0."""
        return torch.zeros((), device=next(iter(self._sums.values())).device)

    @torch.no_grad()
    def see(self) -> None:
        """Add this step's -dL/dW * W, of all parameters of each unit."""
        for group in self._groups:
            products = structure.by_unit(group, _gradient_times_weight).sum(1)
            self._sums[group.path] -= products.to(self._sums[group.path].device)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by module path."""
        return self._sums

    def scores(self) -> dict[str, Tensor]:
        """Return the sums `(U,)` by module path."""
        return {path: sums.cpu() for path, sums in self._sums.items()}

    def finish(self) -> None:
        """Do nothing."""


class Masks:
    """Masks that are drawn anew in each step, and whose logits are trained with the model."""

    watches: Final = False

    def __init__(
        self,
        groups: Sequence[Group],
        fractions: Mapping[Kind, float],
        draw: Callable[[Tensor, float, float, bool], Tensor],
        *,
        begin_at: float,
        lagrangian: bool,
    ) -> None:
        self._groups = [group for group in groups if fractions.get(group.kind)]
        self._fractions = {k: f for k, f in fractions.items() if f}
        self._draw, self._lagrangian = draw, lagrangian
        device = structure.matrix(self._groups[0].reader).device
        self._logits = {
            kind: nn.Parameter(torch.full((self._count(kind),), begin_at, device=device))
            for kind in self._fractions
        }
        # Of the linear and of the quadratic term; they are trained to make the loss larger.
        self._multipliers = {
            kind: nn.Parameter(torch.zeros(2, device=device)) for kind in self._fractions
        }
        self._masks: dict[str, Tensor] = {}
        self._done = 0.0
        self._handles = [g.reader.register_forward_pre_hook(self._hook(g)) for g in self._groups]

    def options(self) -> list[dict[str, Any]]:
        """Return the logits, and the multipliers if there are any."""
        fixed = {"lr": RATE, "weight_decay": 0.0}
        found: list[dict[str, Any]] = [{"params": list(self._logits.values())} | fixed]
        if self._lagrangian:
            found.append({"params": list(self._multipliers.values()), "maximize": True} | fixed)
        return found

    def begin(self, done: float) -> None:
        """Draw this step's masks."""
        self._done = done
        self._masks = self._all(noisy=True)

    def penalty(self) -> Tensor:
        """Return l1 (e - t) + l2 (e - t)^2, e the expected share that goes and t its target.

        Wang, Wohlwend and Lei 2020, section 3.3, https://arxiv.org/abs/1910.04732
        """
        total = next(iter(self._logits.values())).new_zeros(())
        if not self._lagrangian:
            return total
        for kind, logits in self._logits.items():
            closed = 1 - torch.sigmoid(logits - SHARPNESS * math.log(-LOW / HIGH)).mean()
            excess = closed - self._share(kind)
            linear, quadratic = self._multipliers[kind]
            total = total + linear * excess + quadratic * excess.square()
        return total

    def see(self) -> None:
        """Do nothing: the optimizer trains the logits."""

    def tensors(self) -> dict[str, Tensor]:
        """Return logits and multipliers."""
        found: dict[str, Tensor] = {f"logits.{kind}": x for kind, x in self._logits.items()}
        if self._lagrangian:
            found |= {f"multipliers.{kind}": x for kind, x in self._multipliers.items()}
        return found

    def scores(self) -> dict[str, Tensor]:
        """Return the logits `(U,)` by module path."""
        return {path: x.cpu() for path, x in self._split(self._logits).items()}

    @torch.no_grad()
    def finish(self) -> None:
        """Take the masks away, and multiply the readers' columns by what they are without noise."""
        self._done = 1.0
        masks = self._all(noisy=False)
        for handle in self._handles:
            handle.remove()
        for group in self._groups:
            weight = structure.matrix(group.reader)
            weight.mul_(masks[group.path].repeat_interleave(group.width).to(weight.device))

    def _hook(self, group: Group) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        width = group.width

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            masks = self._masks if module.training else self._all(noisy=False)
            return (args[0] * masks[group.path].repeat_interleave(width), *args[1:])

        return hook

    def _all(self, *, noisy: bool) -> dict[str, Tensor]:
        drawn = {
            kind: self._draw(logits, 1 - self._share(kind), self._done, noisy)
            for kind, logits in self._logits.items()
        }
        return self._split(drawn)

    def _split(self, of_kind: Mapping[Kind, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind, values in of_kind.items():
            groups = [group for group in self._groups if group.kind == kind]
            parts = values.detach() if values.is_leaf else values
            split = parts.split([len(group.kept) for group in groups])
            found |= {group.path: part for group, part in zip(groups, split, strict=True)}
        return found

    def _count(self, kind: Kind) -> int:
        return sum(len(group.kept) for group in self._groups if group.kind == kind)

    def _share(self, kind: Kind) -> float:
        """Return the share of a kind's units that is to go by now."""
        return self._fractions[kind] * min(1.0, self._done / RISE)


def hard_concrete(logits: Tensor, kept: float, done: float, noisy: bool) -> Tensor:  # noqa: FBT001
    """Return masks `(U,)` that are exactly 0 or 1 with a probability that can be trained.

    Louizos, Welling and Kingma 2018, section 2.2, https://arxiv.org/abs/1712.01312; on heads: Voita
    et al. 2019, https://arxiv.org/abs/1905.09418
    """
    del kept, done  # the Lagrangian sees to it
    stretched = torch.sigmoid(logits)
    if noisy:
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        stretched = torch.sigmoid((torch.logit(uniform) + logits) / SHARPNESS)
    return (stretched * (HIGH - LOW) + LOW).clamp(0, 1)


def soft_top_k(logits: Tensor, kept: float, done: float, noisy: bool) -> Tensor:  # noqa: FBT001
    """Return masks `(U,)` that sum to the number of units that is kept, sharper and sharper.

    sigmoid((x - c) / T) with Gumbel noise in x and c such that the sum is exact. Differentiable
    subset pruning, Li et al. 2021, https://arxiv.org/abs/2108.04657, has one softmax a kept unit
    instead, too many of them for neurons.
    """
    count = kept * len(logits)
    temperature = COLDEST**done
    if noisy:
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)))
        logits = logits + noise
    with torch.no_grad():
        low, high = logits.min() - 20 * temperature, logits.max() + 20 * temperature
        for _ in range(50):
            centre = (low + high) / 2
            over = torch.sigmoid((logits - centre) / temperature).sum() > count
            low, high = torch.where(over, centre, low), torch.where(over, high, centre)
    soft = torch.sigmoid((logits - centre) / temperature)
    # One step of Newton's method at the solution leaves its value and gives it its derivative.
    slope = (soft * (1 - soft)).sum().detach().clamp_min(1e-6) / temperature
    centre = centre + (soft.sum() - count) / slope
    return torch.sigmoid((logits - centre) / temperature)


def _gradient_times_weight(linear: nn.Module) -> Tensor:
    """Return dL/dW * W of a matrix `(O, I)`."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    product = gradient * weight
    return product if isinstance(linear, nn.Linear) else product.T


def _hard_concrete(groups: Sequence[Group], fractions: Mapping[Kind, float]) -> Masks:
    return Masks(groups, fractions, hard_concrete, begin_at=OPEN, lagrangian=True)


def _exact_k(groups: Sequence[Group], fractions: Mapping[Kind, float]) -> Masks:
    return Masks(groups, fractions, soft_top_k, begin_at=0.0, lagrangian=False)


LEARNERS: Final[
    Mapping[str, Callable[[Sequence[Group], Mapping[Kind, float]], Movement | Masks]]
] = {
    "exact-k": _exact_k,
    "hard-concrete": _hard_concrete,
    "movement": Movement,
}
"""The criteria that learn while the model trains."""
