"""Choose what goes, and cut it out.

U units, w inputs of a unit.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.accuracy import Track, silent
from pipeline import calibration, compensation, selfcheck, structure, surgery
from pipeline.criteria import CRITERIA, GRADIENT, MOMENTS, SWAPS, Evidence
from pipeline.structure import Group, Kind, Units
from pipeline.surgery import Cuts


def units(model: PreTrainedModel) -> Units:
    """Return what can be cut: dicts, module path -> number of units, in module order.

    Raises:
        ValueError: the family is not known and did not pass the self-check, or its weights are
            quantized.
    """
    selfcheck.ensure(model)
    found = structure.groups(model)
    of_kind = {
        kind: {group.path: len(group.kept) for group in found if group.kind == kind}
        for kind in structure.KINDS
    }
    return Units(**of_kind)


def prune_heads(model: PreTrainedModel, heads: Cuts) -> None:
    """Cut attention heads out, in place.

    Args:
        model: any family in `architectures.ARCHITECTURES`, or that `selfcheck` can cut.
        heads: layer index, or attention path as `units` names it -> heads, by their numbers in the
            unpruned model. In grouped-query attention a head is a key/value head with its queries.
            An attention that loses all its heads gives the bias of its output projection.

    Raises:
        ValueError: no such layer, path or head; nothing is cut then.
    """
    selfcheck.ensure(model)
    surgery.cut(model, "heads", heads)


def prune_queries(model: PreTrainedModel, queries: Cuts) -> None:
    """Cut query heads out of grouped-query attention, in place, as many from every group.

    Args:
        model: a family whose query heads share key/value heads.
        queries: layer index, or attention path as `units` names it -> query heads, by their numbers
            in the unpruned model. With `prune_heads` a whole group goes instead.

    Raises:
        ValueError: no such layer, path or query head, or not as many would be left in every group;
            nothing is cut then.
    """
    selfcheck.ensure(model)
    surgery.cut(model, "queries", queries)


def prune_neurons(model: PreTrainedModel, neurons: Cuts) -> None:
    """Cut FFN neurons out, in place.

    Args:
        model: any family in `architectures.ARCHITECTURES`, or that `selfcheck` can cut.
        neurons: layer index, or FFN path as `units` names it -> neurons, by their numbers in the
            unpruned model. An FFN that loses all of them gives the bias of its second matrix.

    Raises:
        ValueError: no such layer, path or neuron; nothing is cut then.
    """
    selfcheck.ensure(model)
    surgery.cut(model, "neurons", neurons)


def prune_layers(model: PreTrainedModel, layers: Iterable[int | str]) -> None:
    """Cut whole transformer blocks out, in place.

    Args:
        model: any family in `architectures.ARCHITECTURES`, or that `selfcheck` can cut.
        layers: numbers in the unpruned model; for an encoder-decoder with the stack before it, as
            in `decoder.layers.3`.

    Raises:
        ValueError: no such layer, none would be left, or it has to stay; nothing is cut then.
    """
    selfcheck.ensure(model)
    surgery.cut_layers(model, layers)


@dataclass(frozen=True)
class Choice:
    """What `choose_and_cut` did: scores before, units removed, and repair errors (before, after).

    All by module path; `scored` are the units that the scores are of. Units are numbers in the
    unpruned model.
    """

    scores: dict[str, list[float]]
    removed: dict[str, list[int]]
    repairs: dict[str, tuple[float, float]]
    scored: dict[str, list[int]]


def choose_and_cut(
    model: PreTrainedModel,
    fractions: Mapping[Kind, float],
    *,
    criterion: str,
    repair: str,
    uniform: bool = False,
    multiple: int = 1,
    seed: int = 0,
    learned: Mapping[str, Tensor] | None = None,
    data: Callable[[], Iterable[calibration.Batch]],
    total: int,
    track: Track = silent,
) -> Choice:
    """Cut the lowest-scored units out, over all layers at once, and repair what read them.

    Args:
        model: changed in place.
        fractions: of each kind, the share of all its units that goes.
        criterion: a key of `criteria.CRITERIA`; any other needs `learned`.
        repair: what is done about the matrices that read the removed units: a key of
            `compensation.REPAIRS`, or `none`.
        uniform: cut the same share of every layer's units.
        multiple: the number of neurons left in a layer is rounded to a multiple of it.
        seed: of the criterion `random`.
        learned: scores by module path, where a training has found them already.
        data: gives the calibration batches, anew each time; `total` of them.
        total: number of batches.
        track: shows progress.

    Raises:
        ValueError: the model cannot be cut, a reader has no bias that could be repaired, or there
            is too little data; query heads have no scores.
    """
    if fractions.get("queries"):
        raise ValueError("queries: found a share, expected numbers; use prune_queries")
    selfcheck.ensure(model)
    groups = [g for g in structure.groups(model) if g.kept and fractions.get(g.kind)]
    if not groups:
        return Choice({}, {}, {}, {})
    refuse_repair(groups, repair)
    known = gather(model, groups, criterion, data, seed=seed, total=total, track=track)
    scores = dict(learned or score(model, groups, criterion, known, data, total=total, track=track))
    lowest = lowest_of(groups, scores, fractions, uniform=uniform, multiple=multiple)
    if criterion in SWAPS:
        lowest = {g.path: SWAPS[criterion](known(g, None), lowest[g.path]) for g in groups}

    cut = [group for group in groups if len(lowest[group.path])]
    places = {group.path: others(lowest[group.path], len(group.kept)) for group in cut}
    weights: dict[str, Tensor] = {}
    repairs: dict[str, tuple[float, float]] = {}
    if repair != "none":
        moments = second_moments(model, cut, data, total=total, track=track)
        for group, seen in track(moments, "repairing", len(cut)):
            mended = repaired(group, seen, places[group.path], repair)
            weights[group.path] = mended.weight.float()
            repairs[group.path] = mended.error_before, mended.error_after
    removed = {g.path: [g.kept[at] for at in lowest[g.path].sort().values] for g in cut}
    for group in cut:
        cut_and_write(model, group, places[group.path], weights.get(group.path))
    scored = {group.path: list(group.kept) for group in groups}
    return Choice({path: s.tolist() for path, s in scores.items()}, removed, repairs, scored)


def lowest_of(
    groups: Iterable[Group],
    scores: Mapping[str, Tensor],
    fractions: Mapping[Kind, float],
    *,
    uniform: bool = False,
    multiple: int = 1,
) -> dict[str, Tensor]:
    """Return the places of each group's units that go, by its path; see `choose_and_cut`."""
    found: dict[str, Tensor] = {}
    for kind, fraction in fractions.items():
        of_kind = {group.path: scores[group.path] for group in groups if group.kind == kind}
        rounded = multiple if kind == "neurons" else 1
        found |= choose(of_kind, fraction, uniform=uniform, multiple=rounded)
    return found


def refuse_repair(groups: Iterable[Group], repair: str) -> None:
    """Raise ValueError if a reader has no bias, and the repair is that of the bias."""
    for group in groups:
        if repair == "bias" and structure.bias(group.reader) is None:
            raise ValueError(
                f"repair: found no bias in {group.path}, expected one; use least-squares or none"
            )


Known = Callable[[Group, calibration.Moments | None], Evidence]
"""Tells what a criterion needs to know of a group, given its reader's second moments."""


def gather(
    model: PreTrainedModel,
    groups: Sequence[Group],
    criterion: str,
    data: Callable[[], Iterable[calibration.Batch]],
    *,
    seed: int = 0,
    total: int,
    track: Track = silent,
) -> Known:
    """Return what tells a criterion of the groups; all data are gone through at once.

    Weights are copied of the group that is asked for alone. The groups have to be of different
    paths: heads and query heads of an attention are not. The rest is as for `choose_and_cut`.
    """
    gradients: Mapping[str, Tensor] = {}
    if criterion in GRADIENT:
        readers = {group.path: group.reader for group in groups}
        counts = {group.path: len(group.kept) for group in groups}
        gradients = calibration.mask_gradients(
            model, readers, counts, data(), total=total, track=track
        )
    generator = torch.Generator().manual_seed(seed)

    def known(group: Group, seen: calibration.Moments | None) -> Evidence:
        return Evidence(
            structure.by_unit(group),
            gradients.get(group.path),
            reader(group),
            seen.fit if seen else None,
            generator,
        )

    return known


def score(
    model: PreTrainedModel,
    groups: Sequence[Group],
    criterion: str,
    known: Known,
    data: Callable[[], Iterable[calibration.Batch]],
    *,
    total: int,
    track: Track = silent,
) -> dict[str, Tensor]:
    """Return the scores `(U,)` of each group's units by its path; `known` is what `gather` gave."""
    if criterion in MOMENTS:
        moments = second_moments(model, groups, data, total=total, track=track)
        return {group.path: CRITERIA[criterion](known(group, seen)) for group, seen in moments}
    return {group.path: CRITERIA[criterion](known(group, None)) for group in groups}


MOMENTS_BYTES: Final = 1 << 30
"""Second moments of so many bytes are held at once, or those of one reader if they are larger."""


def second_moments(
    model: PreTrainedModel,
    groups: Sequence[Group],
    data: Callable[[], Iterable[calibration.Batch]],
    *,
    total: int,
    track: Track = silent,
) -> Iterator[tuple[Group, calibration.Moments]]:
    """Yield each group with the second moments of its reader's input.

    The data are gone through once for as many groups as `MOMENTS_BYTES` hold: memory grows with
    the width of the model, not with its depth.
    """
    sizes = [2 * 8 * (structure.matrix(group.reader).shape[1] + 1) ** 2 for group in groups]
    for part in in_parts(groups, sizes, MOMENTS_BYTES):
        readers = {group.path: group.reader for group in part}
        seen = calibration.moments(model, readers, data(), total=total, track=track)
        for group in part:
            yield group, seen.pop(group.path)


_T = TypeVar("_T")


def in_parts(items: Sequence[_T], sizes: Sequence[int], most: int) -> list[list[_T]]:
    """Return the items in their order, as many a part as come to `most`, or a larger one alone."""
    parts: list[list[_T]] = []
    held = math.inf
    for item, size in zip(items, sizes, strict=True):
        if held + size > most:
            parts.append([])
            held = 0
        parts[-1].append(item)
        held += size
    return parts


def choose(
    scores: Mapping[str, Tensor], fraction: float, *, uniform: bool = False, multiple: int = 1
) -> dict[str, Tensor]:
    """Return the places of the lowest-scored units; each group keeps at least one.

    Over all groups together, or if `uniform` the same share of each; what is left of a group is
    rounded to the nearest `multiple`, at least one and at most what there is.
    """
    if uniform:
        gone = {path: round(fraction * len(of_group)) for path, of_group in scores.items()}
    else:
        gone = _lowest(scores, fraction)
    removed = {}
    for path, of_group in scores.items():
        count = len(of_group)
        left = max(1, round((count - gone[path]) / multiple)) * multiple
        left = min(left, count)
        removed[path] = of_group.argsort(stable=True)[: count - left]
    return removed


def _lowest(scores: Mapping[str, Tensor], fraction: float) -> dict[str, int]:
    """Return how many of each group are among the lowest of all, less what has to stay."""
    ranked = sorted((float(score), path) for path, of_group in scores.items() for score in of_group)
    wanted = round(fraction * len(ranked))
    gone = dict.fromkeys(scores, 0)
    for _, path in ranked:
        if not wanted:
            break
        if gone[path] < len(scores[path]) - 1:
            gone[path] += 1
            wanted -= 1
    return gone


def others(places: Tensor, count: int) -> Tensor:
    """Return the places below `count` that are not among these, in their order."""
    there = torch.ones(count, dtype=torch.bool)
    there[places] = False
    return there.nonzero()[:, 0]


def reader(group: Group) -> Tensor:
    """Return the matrix that reads the units `(O, I)`, its bias the last column if it has one."""
    weight, bias = structure.matrix(group.reader).detach(), structure.bias(group.reader)
    return weight if bias is None else torch.cat([weight, bias.detach()[:, None]], dim=1)


def columns(group: Group, places: Tensor) -> Tensor:
    """Return the columns of `reader` that stay with the units at `places`: theirs, and the bias."""
    kept = torch.isin(surgery.owners(group), places).nonzero().flatten()
    if structure.bias(group.reader) is not None:
        kept = torch.cat([kept, torch.tensor([structure.matrix(group.reader).shape[1]])])
    return kept


def repaired(
    group: Group, seen: calibration.Moments, places: Tensor, repair: str
) -> compensation.Repair:
    """Return the reader of the units at `places`, repaired, with the errors before and after."""
    weight, kept = reader(group), columns(group, places)
    size = weight.shape[1]
    within = calibration.Moments(seen.fit[:size, :size], seen.held_out[:size, :size])
    if repair == "none" or not len(kept) or len(kept) == size:
        exact = weight.double()
        error = compensation.error(exact, within.held_out, kept, exact[:, kept])
        return compensation.Repair(exact[:, kept], error, error)
    return compensation.REPAIRS[repair](weight, within, kept)


def cut_and_write(
    model: PreTrainedModel, group: Group, places: Tensor, weight: Tensor | None
) -> None:
    """Cut a group down to the units at `places`, with this reader unless it stays as it was."""
    if weight is not None and not len(places):  # then there is no reader any more, but its bias
        whole = reader(group).to(weight.dtype)
        whole[:, columns(group, places)] = weight
        write_reader(group, whole)
    surgery.keep(model, group, [group.kept[at] for at in places])
    if weight is not None and len(places):
        write_reader(group, weight)


@torch.no_grad()
def write_reader(group: Group, weight: Tensor) -> None:
    """Put a weight `(O, K)`, the bias its last column if there is one, into the reader."""
    bias = structure.bias(group.reader)
    if bias is not None:
        bias.copy_(weight[:, -1])
        weight = weight[:, :-1]
    structure.matrix(group.reader).copy_(weight)
