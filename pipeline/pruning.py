"""Choose what goes, and cut it out.

Cutting is exact: a model without a unit gives the same outputs as the model with that unit's
contribution set to zero. Units are named by their numbers in the unpruned model, however often it
is cut, and `config.pruning` remembers what is left; to cut a unit twice is to cut it once.

U units, w inputs of a unit.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.accuracy import Track, silent
from pipeline import architectures, calibration, compensation
from pipeline.architectures import Group, Kind, Matrix
from pipeline.criteria import CRITERIA, GRADIENT, Evidence

Cuts = Mapping[int | str, Iterable[int]]


def prune_heads(model: PreTrainedModel, heads: Cuts) -> None:
    """Cut attention heads out, in place.

    Args:
        model: one of the families in `architectures.ARCHITECTURES`.
        heads: layer index, or attention path as `units` names it -> heads, by their numbers in the
            unpruned model. In grouped-query attention a head is a key/value head with its queries.

    Raises:
        ValueError: no such layer, path or head, or no head would be left; nothing is cut then.
    """
    _prune(model, "heads", heads)


def prune_neurons(model: PreTrainedModel, neurons: Cuts) -> None:
    """Cut FFN neurons out, in place.

    Args:
        model: one of the families in `architectures.ARCHITECTURES`.
        neurons: layer index, or FFN path as `units` names it -> neurons, by their numbers in the
            unpruned model.

    Raises:
        ValueError: no such layer, path or neuron, or none would be left; nothing is cut then.
    """
    _prune(model, "neurons", neurons)


def prune_layers(model: PreTrainedModel, indices: Iterable[int]) -> None:
    """Cut whole transformer blocks out, in place, by their numbers in the unpruned model.

    Raises:
        ValueError: no such layer, or none would be left; nothing is cut then.
    """
    blocks, cut = architectures.layers(model), architectures.record(model)
    known = cut["layers"] or {"kept": list(range(len(blocks))), "of": len(blocks)}
    removed = set(indices)
    if unknown := removed - set(range(known["of"])):
        raise ValueError(f"layers: found {sorted(unknown)}, expected numbers below {known['of']}")
    stays = [at for at, number in enumerate(known["kept"]) if number not in removed]
    if not stays:
        raise ValueError("layers: found all of them, expected at least one to be left")

    prefix = architectures.architecture(model).layers
    for kind in ("heads", "neurons"):
        cut[kind] = {
            key.replace(f"{prefix}.{before}", f"{prefix}.{after}", 1): entry
            for after, before in enumerate(stays)
            for key, entry in cut[kind].items()
            if f"{key}.".startswith(f"{prefix}.{before}.")
        }
    cut["layers"] = {"kept": [known["kept"][at] for at in stays], "of": known["of"]}
    left = [blocks[at] for at in stays]
    del blocks[:]
    blocks.extend(left)
    for index, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # where a decoder keeps this layer's cache
                setattr(module, "layer_idx", index)  # noqa: B010 - mypy: not declared on Module
    config = model.config
    config.num_hidden_layers = len(left)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[at] for at in stays]
    config.pruning = cut


def apply(model: PreTrainedModel, cut: Mapping[str, dict[str, dict[str, object]]]) -> None:
    """Cut a model as built from its configuration to what the record `cut` says is left."""
    for kind in ("heads", "neurons"):
        entries = cut.get(kind, {})
        for group in architectures.groups(model):
            if group.kind == kind and group.key in entries:
                kept = architectures.decode(entries[group.key]["kept"])  # type: ignore[arg-type]
                _cut(model, group, [unit for unit in group.kept if unit in set(kept)])
    if cut.get("layers"):
        model.config.pruning = architectures.record(model) | {"layers": cut["layers"]}


def _prune(model: PreTrainedModel, kind: Kind, cuts: Cuts) -> None:
    found = {group.path: group for group in architectures.groups(model) if group.kind == kind}
    by_layer = {group.layer: path for path, group in found.items()}
    planned: dict[str, set[int]] = {}
    for key, numbers in cuts.items():
        path = by_layer.get(key) if isinstance(key, int) else key
        if path not in found:
            expected = sorted(by_layer) if isinstance(key, int) else list(found)
            raise ValueError(f"{kind}: found {key!r}, expected one of {expected}")
        planned.setdefault(path, set()).update(numbers)
    for path, removed in planned.items():
        group = found[path]
        if unknown := removed - set(range(group.of)):
            raise ValueError(
                f"{path}: found {kind} {sorted(unknown)}, expected numbers below {group.of}"
            )
        if removed.issuperset(group.kept):
            raise ValueError(f"{path}: found all {kind}, expected at least one to be left")
    for path, removed in planned.items():
        _cut(model, found[path], [unit for unit in found[path].kept if unit not in removed])


def _cut(model: PreTrainedModel, group: Group, stays: list[int]) -> None:
    """Keep the units `stays` of the group, and write it down."""
    places, width = positions(group, stays), group.width
    for written in group.inputs:
        linear = group.module.get_submodule(written.path)
        _slice(linear, "out", _outputs(linear, written, len(group.kept), places))
    _slice(group.reader, "in", _expand(places, width))
    for attribute, meaning in group.sizes.items():
        owner, _, name = attribute.rpartition(".")
        size = len(stays) if meaning == "units" else len(stays) * width
        setattr(group.module.get_submodule(owner), name, size)
    cut = architectures.record(model)
    kept = architectures.encode(tuple(stays), group.of)
    cut[group.kind][group.key] = {"kept": kept, "of": group.of}
    model.config.pruning = cut


def positions(group: Group, numbers: Iterable[int]) -> Tensor:
    """Return where units, by their numbers in the unpruned model, stand now."""
    place = {unit: at for at, unit in enumerate(group.kept)}
    return torch.tensor([place[unit] for unit in numbers], dtype=torch.long)


def _expand(places: Tensor, width: int) -> Tensor:
    """Return the indices of all `width` entries of the units at `places`."""
    return (places[:, None] * width + torch.arange(width)).flatten()


def _outputs(linear: nn.Module, written: Matrix, count: int, places: Tensor) -> Tensor:
    """Return the outputs of a matrix that belong to the units at `places`, in every block."""
    block = architectures.matrix(linear).shape[0] // written.blocks
    within = _expand(places, block // count)
    return torch.cat([within + start * block for start in range(written.blocks)])


def _slice(linear: nn.Module, side: Literal["in", "out"], index: Tensor) -> None:
    """Keep some inputs or outputs of an `nn.Linear` or a `Conv1D`."""
    is_linear = isinstance(linear, nn.Linear)
    _keep(linear, "weight", 0 if (side == "out") == is_linear else 1, index)
    if side == "out" and linear.bias is not None:
        _keep(linear, "bias", 0, index)
    outputs, inputs = architectures.matrix(linear).shape
    names = ("in_features", "out_features") if is_linear else ("nx", "nf")
    for name, size in zip(names, (inputs, outputs), strict=True):
        setattr(linear, name, size)


def _keep(module: nn.Module, name: str, axis: int, index: Tensor) -> None:
    old = getattr(module, name)
    new = old.detach().index_select(axis, index.to(old.device))
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


@dataclass(frozen=True)
class Choice:
    """What `choose_and_cut` did: scores before, units removed, and repair errors (before, after).

    All by module path; the removed units are numbers in the unpruned model.
    """

    scores: dict[str, list[float]]
    removed: dict[str, list[int]]
    repairs: dict[str, tuple[float, float]]


def choose_and_cut(
    model: PreTrainedModel,
    fractions: Mapping[Kind, float],
    *,
    criterion: str,
    repair: Literal["least-squares", "none"],
    data: Callable[[], Iterable[calibration.Batch]],
    total: int,
    track: Track = silent,
) -> Choice:
    """Cut the lowest-scored units out, over all layers at once, and repair what read them.

    Args:
        model: changed in place.
        fractions: of each kind, the share of all its units that goes.
        criterion: a key of `criteria.CRITERIA`.
        repair: what is done about the layers that read the removed units.
        data: gives the calibration batches, anew each time; `total` of them.
        total: number of batches.
        track: shows progress.
    """
    groups = [g for g in architectures.groups(model) if fractions.get(g.kind)]
    readers = {group.path: group.reader for group in groups}
    counts = {group.path: len(group.kept) for group in groups}
    gradients: Mapping[str, Tensor] = {}
    if criterion in GRADIENT:
        gradients = calibration.mask_gradients(
            model, readers, counts, data(), total=total, track=track
        )
    scores = {
        group.path: CRITERIA[criterion](Evidence(_weights(group), gradients.get(group.path)))
        for group in groups
    }
    lowest: dict[str, Tensor] = {}
    for kind, fraction in fractions.items():
        of_kind = {group.path: scores[group.path] for group in groups if group.kind == kind}
        lowest |= choose(of_kind, fraction)
    seen: Mapping[str, calibration.Moments] = {}
    if repair == "least-squares":
        seen = calibration.moments(model, readers, data(), total=total, track=track)

    removed, repairs = {}, {}
    for group in track(groups, "cutting", len(groups)):
        gone = set(lowest[group.path].tolist())
        if not gone:
            continue
        places = torch.tensor([at for at in range(len(group.kept)) if at not in gone])
        mended = None
        if seen:
            mended = _repair(group, seen[group.path], places)
            repairs[group.path] = (mended.error_before, mended.error_after)
        removed[group.path] = [group.kept[at] for at in sorted(gone)]
        _cut(model, group, [group.kept[at] for at in places])
        if mended is not None:
            _write(group.reader, mended.weight)
    return Choice({path: s.tolist() for path, s in scores.items()}, removed, repairs)


def choose(scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Return the places of the lowest-scored units, over all groups; each keeps at least one."""
    ranked = sorted(
        (float(score), path, at)
        for path, group_scores in scores.items()
        for at, score in enumerate(group_scores)
    )
    wanted = round(fraction * len(ranked))
    removed: dict[str, list[int]] = {path: [] for path in scores}
    for _, path, at in ranked:
        if not wanted:
            break
        if len(removed[path]) < len(scores[path]) - 1:
            removed[path].append(at)
            wanted -= 1
    return {path: torch.tensor(places, dtype=torch.long) for path, places in removed.items()}


def _weights(group: Group) -> Tensor:
    """Return all parameters of each unit `(U, P)`."""
    count = len(group.kept)
    parts = [architectures.matrix(group.reader).T.reshape(count, -1)]
    for written in group.inputs:
        weight = architectures.matrix(group.module.get_submodule(written.path))
        parts.extend(weight.reshape(written.blocks, count, -1))
    return torch.cat(parts, dim=1).detach()


def _repair(group: Group, seen: calibration.Moments, places: Tensor) -> compensation.Repair:
    weight = architectures.matrix(group.reader).detach()
    bias = architectures.bias(group.reader)
    kept = _expand(places, group.width)
    if bias is not None:
        weight = torch.cat([weight, bias.detach()[:, None]], dim=1)
        kept = torch.cat([kept, torch.tensor([weight.shape[1] - 1])])
    return compensation.repair(weight, seen, kept)


@torch.no_grad()
def _write(reader: nn.Module, weight: Tensor) -> None:
    """Put a repaired weight `(O, K)`, the bias its last column if there is one, into the reader."""
    bias = architectures.bias(reader)
    if bias is not None:
        bias.copy_(weight[:, -1])
        weight = weight[:, :-1]
    architectures.matrix(reader).copy_(weight)
