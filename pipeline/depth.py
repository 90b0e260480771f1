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
    cut = structure.record(model)["layers"]
    candidates: dict[str, Without] = {}
    keep_one: dict[str, set[str]] = {}
    count = 0
    for stack, blocks in structure.stacks(model):
        numbers = cut.get(stack.layers, {}).get("kept", range(len(blocks)))
        names = [f"{stack.layers}.{number}" for number in numbers]
        count += len(names)
        keep_one[stack.layers] = set(names)
        for number, name, block in zip(numbers, names, blocks, strict=True):
            if not (stack.first and number == 0):
                candidates[name] = _skipping(block)
    gone = _greedy(
        model, candidates, list(keep_one.values()), round(share * count), judged=judged, track=track
    )
    surgery.cut_layers(model, gone)
    return gone


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
    with ExitStack() as without:
        for _ in track(range(count), "dropping", count):
            divergences = {}
            for name, candidate in candidates.items():
                if name in gone or any({name} == names - set(gone) for names in keep_one):
                    continue
                with candidate():
                    divergences[name] = divergence(model, dense, judged)
            if not divergences:
                break
            best = min(divergences, key=lambda name: divergences[name])
            gone[best] = divergences[best]
            without.enter_context(candidates[best]())
    return gone


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
