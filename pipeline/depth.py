"""Which layers, and which attentions and FFN as a whole, a model misses least.

One after the other goes, always the one without which the outputs stay nearest to the dense
model's: measured, since what a layer is worth depends on those that are gone already.

Cost: a pass over the batches for every candidate and every one that goes.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.accuracy import Track, silent
from pipeline import pruning, selfcheck, structure, surgery
from pipeline.calibration import Batch
from pipeline.distillation import divergence

Without = Callable[[], AbstractContextManager[None]]


def drop_layers(
    model: PreTrainedModel, share: float, judged: Sequence[Batch], *, track: Track = silent
) -> dict[str, float]:
    """Cut a share of all layers out, in place; every stack keeps one.

    Return their names in the order in which they went, each with the divergence from the dense
    model after it, in nats.

    Args:
        model: changed in place.
        share: of the layers that it has, of all stacks together.
        judged: batches on which outputs are compared with the dense model's.
        track: shows progress.

    Raises:
        ValueError: the model cannot be cut.
    """
    selfcheck.ensure(model)
    refuse_layers(model)
    found, keep_one = candidates(model), [set(names) for names in _names(model)]
    count = round(share * sum(map(len, keep_one)))
    gone = _greedy(model, found, keep_one, count, judged=judged, track=track)
    surgery.cut_layers(model, gone)
    return gone


def candidates(model: PreTrainedModel) -> dict[str, Without]:
    """Return what leaves out each layer that may go, by its name."""
    return {name: _skipping(block) for name, block in blocks(model).items()}


def blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the layers that may go, by their names: numbers in the unpruned model."""
    found: dict[str, nn.Module] = {}
    for (stack, layers), names in zip(structure.stacks(model), _names(model), strict=True):
        found |= {
            name: block
            for name, block in zip(names, layers, strict=True)
            if not (stack.first and name == f"{stack.layers}.0")
        }
    return found


def next_layer(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    gone: Sequence[str],
    judged: Sequence[Batch],
) -> tuple[str, float] | None:
    """Return the layer that is missed least beside those that are gone, and the divergence then.

    Nothing is cut. None if every stack is at its last layer.
    """
    found, keep_one = candidates(model), [set(names) for names in _names(model)]
    with without(found[name] for name in gone):
        return _least(model, dense, _may_go(found, keep_one, gone), judged)


@contextmanager
def without(these: Iterable[Without]) -> Iterator[None]:
    """Leave all of these out."""
    with ExitStack() as stack:
        for each in these:
            stack.enter_context(each())
        yield


def _names(model: PreTrainedModel) -> list[list[str]]:
    """Return the names of the layers of every stack."""
    cut = structure.record(model)["layers"]
    return [
        [
            f"{stack.layers}.{number}"
            for number in cut.get(stack.layers, {}).get("kept", range(len(layers)))
        ]
        for stack, layers in structure.stacks(model)
    ]


def refuse_layers(model: PreTrainedModel) -> None:
    """Raise ValueError if a stack has to keep all its layers."""
    for stack, _ in structure.stacks(model):
        if bound := surgery.why_all_stay(model, stack):
            raise ValueError(f"{stack.layers}: found {bound}; none can be cut out")


def drop_sublayers(
    model: PreTrainedModel,
    share: float,
    judged: Sequence[Batch],
    *,
    repair: str,
    data: Callable[[], Iterable[Batch]],
    total: int,
    track: Track = silent,
) -> dict[str, float]:
    """Cut a share of all attentions and FFN out, in place; what is left of one is a bias.

    Return their paths in that order, each with the divergence after it.

    Args and errors as for `drop_layers`; `repair` is a key of `compensation.REPAIRS` or `none`,
    `data` gives the calibration batches for it, anew each time, `total` of them.
    """
    selfcheck.ensure(model)
    groups = {g.path: g for g in structure.groups(model) if g.kept and g.kind != "queries"}
    pruning.refuse_repair(groups.values(), repair)
    candidates = {path: _silencing(group.reader) for path, group in groups.items()}
    gone = _greedy(model, candidates, [], round(share * len(groups)), judged=judged, track=track)
    none, weights = torch.arange(0), dict[str, Tensor]()
    if repair != "none":
        chosen = [groups[path] for path in gone]
        for group, seen in pruning.second_moments(model, chosen, data, total=total, track=track):
            weights[group.path] = pruning.repaired(group, seen, none, repair).weight
    for path in gone:
        pruning.cut_and_write(model, groups[path], none, weights.get(path))
    return gone


@torch.inference_mode()
def _greedy(
    model: PreTrainedModel,
    candidates: Mapping[str, Without],
    keep_one: Sequence[set[str]],
    count: int,
    *,
    judged: Sequence[Batch],
    track: Track,
) -> dict[str, float]:
    """Return the names of what goes, in order, with the divergence after each."""
    dense = copy.deepcopy(model)
    gone: dict[str, float] = {}
    with ExitStack() as left_out:
        for _ in track(range(count), "dropping", count):
            found = _least(model, dense, _may_go(candidates, keep_one, gone), judged)
            if found is None:
                break
            gone[found[0]] = found[1]
            left_out.enter_context(candidates[found[0]]())
    return gone


def _may_go(
    candidates: Mapping[str, Without], keep_one: Sequence[set[str]], gone: Iterable[str]
) -> dict[str, Without]:
    """Return those that are there, and not the last of those of which one has to stay."""
    left = set(candidates) - set(gone)
    return {
        name: candidate
        for name, candidate in candidates.items()
        if name in left and not any({name} == names - set(gone) for names in keep_one)
    }


@torch.inference_mode()
def _least(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    candidates: Mapping[str, Without],
    judged: Sequence[Batch],
) -> tuple[str, float] | None:
    """Return which one is missed least when it goes too, and the divergence then."""
    divergences = {}
    for name, candidate in candidates.items():
        with candidate():
            divergences[name] = divergence(model, dense, judged)
    if not divergences:
        return None
    best = min(divergences, key=lambda name: divergences[name])
    return best, divergences[best]


def _skipping(block: nn.Module) -> Without:
    """Return what makes a layer hand on what it gets."""

    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], given: Any) -> Any:
        states = args[0] if args else named["hidden_states"]
        return states if isinstance(given, Tensor) else (states, *given[1:])

    return lambda: _removed(block.register_forward_hook(hook, with_kwargs=True))


def _silencing(reader: nn.Module) -> Without:
    """Return what makes a matrix read zeros."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (torch.zeros_like(args[0]), *args[1:])

    return lambda: _removed(reader.register_forward_pre_hook(hook))


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
