"""Choose what goes, and cut it out.

Cutting is exact: a model without a unit gives the same outputs as the model with that unit's
contribution set to zero. Units are named by their numbers in the unpruned model, however often it
is cut, and `config.pruning` remembers what is left; to cut a unit twice is to cut it once.

U units, w inputs of a unit.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.accuracy import Track, silent
from pipeline import architectures, attentions, calibration, compensation
from pipeline.architectures import Attention, Group, Kind, Size, Stack
from pipeline.criteria import CRITERIA, GRADIENT, Evidence

Cuts = Mapping[int | str, Iterable[int]]


def prune_heads(model: PreTrainedModel, heads: Cuts) -> None:
    """Cut attention heads out, in place.

    Args:
        model: one of the families in `architectures.ARCHITECTURES`.
        heads: layer index, or attention path as `units` names it -> heads, by their numbers in the
            unpruned model. In grouped-query attention a head is a key/value head with its queries.
            An attention that loses all its heads gives the bias of its output projection.

    Raises:
        ValueError: no such layer, path or head; nothing is cut then.
    """
    _prune(model, "heads", heads)


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
    _prune(model, "queries", queries)


def prune_neurons(model: PreTrainedModel, neurons: Cuts) -> None:
    """Cut FFN neurons out, in place.

    Args:
        model: one of the families in `architectures.ARCHITECTURES`.
        neurons: layer index, or FFN path as `units` names it -> neurons, by their numbers in the
            unpruned model. An FFN that loses all of them gives the bias of its second matrix.

    Raises:
        ValueError: no such layer, path or neuron; nothing is cut then.
    """
    _prune(model, "neurons", neurons)


def prune_layers(model: PreTrainedModel, layers: Iterable[int | str]) -> None:
    """Cut whole transformer blocks out, in place.

    Args:
        model: one of the families in `architectures.ARCHITECTURES`.
        layers: numbers in the unpruned model; for an encoder-decoder with the stack before it, as
            in `decoder.layers.3`.

    Raises:
        ValueError: no such layer, none would be left, or it has to stay; nothing is cut then.
    """
    found = {stack.layers: (stack, blocks) for stack, blocks in architectures.stacks(model)}
    cut = architectures.record(model)
    of = {
        path: cut["layers"].get(path, {}).get("of", len(blocks))
        for path, (_, blocks) in found.items()
    }
    removed: dict[str, set[int]] = {}
    for named in layers:
        path, _, number = str(named).rpartition(".")
        path = path or (next(iter(found)) if len(found) == 1 else "")
        if path not in found or not number.isdecimal() or int(number) >= of[path]:
            expected = [f"{path}.0 to {path}.{count - 1}" for path, count in of.items()]
            raise ValueError(f"layers: found {named!r}, expected {' or '.join(expected)}")
        removed.setdefault(path, set()).add(int(number))
    stays = {}
    for path, numbers in removed.items():
        stack, blocks = found[path]
        known = cut["layers"].get(path, {}).get("kept", range(len(blocks)))
        stays[path] = {at: n for at, n in enumerate(known) if n not in numbers}
        if not stays[path]:
            raise ValueError(f"{path}: found all layers, expected at least one to be left")
        if not stack.count:
            raise ValueError(f"{path}: found layers that share their weights; none can be cut out")
        if stack.first and 0 in numbers:
            raise ValueError(f"{path}.0: found layer 0, expected another one: {stack.first}")
    for path, kept in stays.items():
        _cut_layers(model, found[path][0], found[path][1], kept, of[path])


def _cut_layers(
    model: PreTrainedModel, stack: Stack, blocks: nn.ModuleList, stays: dict[int, int], of: int
) -> None:
    """Keep the blocks at the places `stays`, whose values are their numbers, and write it down."""
    cut, config, before = architectures.record(model), model.config, len(blocks)
    for kind in architectures.KINDS:
        moved = {}
        for key, entry in cut[kind].items():
            if not key.startswith(f"{stack.layers}."):
                moved[key] = entry
                continue
            at, *rest = key.removeprefix(f"{stack.layers}.").split(".")
            if int(at) in stays:
                moved[".".join([stack.layers, str([*stays].index(int(at))), *rest])] = entry
        cut[kind] = moved
    cut["layers"][stack.layers] = {"kept": list(stays.values()), "of": of}
    left = [blocks[at] for at in stays]
    del blocks[:]
    blocks.extend(left)
    for index, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # where a decoder keeps this layer's cache
                setattr(module, "layer_idx", index)  # noqa: B010 - mypy: not declared on Module
    for name in ("layer_types", "no_rope_layers"):
        if len(getattr(config, name, None) or ()) == before:
            setattr(config, name, [getattr(config, name)[at] for at in stays])
    setattr(config, stack.count, len(left))
    config.pruning = cut


def apply(model: PreTrainedModel, cut: Mapping[str, Any]) -> None:
    """Cut a model as built from its configuration to what the record `cut` says is left.

    Raises:
        ValueError: the record is of another version, or of another model.
    """
    if cut.get("version") != 1:
        raise ValueError(
            f"config.json: pruning: found version {cut.get('version')}, expected 1;"
            " a newer secateur wrote it"
        )
    for kind in architectures.KINDS:
        entries = dict(cut.get(kind, {}))
        for group in architectures.groups(model):
            if group.kind == kind and group.key in entries:
                kept = set(architectures.decode(entries.pop(group.key)["kept"]))
                _cut(model, group, [unit for unit in group.kept if unit in kept])
        if entries:
            raise ValueError(f"config.json: pruning: found {next(iter(entries))}, no such module")
    model.config.pruning = architectures.record(model) | {"layers": cut.get("layers", {})}


def _prune(model: PreTrainedModel, kind: Kind, cuts: Cuts) -> None:
    found = {group.path: group for group in architectures.groups(model) if group.kind == kind}
    by_layer: dict[int, list[str]] = {}
    for path, group in found.items():
        by_layer.setdefault(group.layer, []).append(path)
    planned: dict[str, set[int]] = {}
    for key, numbers in cuts.items():
        paths = by_layer.get(key, []) if isinstance(key, int) else [key]
        if len(paths) > 1:
            raise ValueError(f"{kind}: found layer {key}, expected one of {paths}")
        if not paths or paths[0] not in found:
            expected = sorted(by_layer) if isinstance(key, int) else list(found)
            raise ValueError(f"{kind}: found {key!r}, expected one of {expected}")
        planned.setdefault(paths[0], set()).update(numbers)
    for path, removed in planned.items():
        group = found[path]
        if unknown := removed - set(range(group.of)):
            raise ValueError(
                f"{path}: found {kind} {sorted(unknown)}, expected numbers below {group.of}"
            )
        if kind == "queries":
            _check_even(group, removed)
    for path, removed in planned.items():
        if removed.intersection(found[path].kept):
            _cut(model, found[path], [unit for unit in found[path].kept if unit not in removed])


def _check_even(group: Group, removed: set[int]) -> None:
    each = group.queries // group.heads if group.heads else 0
    # Kept in order, the queries of a key/value head stand side by side.
    left = {
        sum(unit not in removed for unit in group.kept[at : at + each])
        for at in range(0, len(group.kept), each or 1)
    }
    if len(left) > 1 or 0 in left:
        raise ValueError(
            f"{group.path}: found {sorted(left)} query heads left of a key/value head, expected as"
            " many of each, and at least one; prune_heads cuts a key/value head with its queries"
        )


def _cut(model: PreTrainedModel, group: Group, stays: list[int]) -> None:
    """Keep the units `stays` of the group, and write it down."""
    with torch.device("cpu"):  # a model that is being loaded is built on no device
        _take_out(model, group, stays)


def _take_out(model: PreTrainedModel, group: Group, stays: list[int]) -> None:
    if not group.kept:
        return
    if stays:
        places = positions(group, stays)
        for linear, owners in group.writers:
            _slice(linear, "out", torch.isin(owners, torch.cat([places, -places.new_ones(1)])))
        _slice(group.reader, "in", torch.isin(_owners(group), places))
    else:
        _empty(group)
    cut = architectures.record(model)
    kept = architectures.encode(tuple(stays), group.of)
    cut[group.kind][group.key] = {"kept": kept, "of": group.of}
    model.config.pruning = cut
    if stays and isinstance(group.part, Attention):
        after = next(
            g for g in architectures.groups(model) if (g.key, g.kind) == (group.key, group.kind)
        )
        _resize(model, after, group.part)


def _owners(group: Group) -> Tensor:
    """Return for each of the reader's inputs the place of its unit."""
    return torch.arange(len(group.kept)).repeat_interleave(group.width)


def _resize(model: PreTrainedModel, group: Group, part: Attention) -> None:
    """Tell an attention how many heads it has now, and which."""
    core = group.module.get_submodule(part.core)
    counts: dict[Size, int] = {
        "queries": group.queries,
        "groups": group.heads,
        "queries per group": group.queries // group.heads,
        "width": architectures.matrix(group.reader).shape[1],
    }
    for name, meaning in part.sizes.items():
        if name.startswith("config."):
            own = {name.removeprefix("config."): counts[meaning]}
            setattr(core, "config", attentions.LayerConfig(model.config, **own))  # noqa: B010
        else:
            setattr(core, name, counts[meaning])
    if part.mixed is not None:
        attentions.become(core, part.mixed)
        setattr(core, "kept_heads", list(group.kept_queries))  # noqa: B010
        setattr(core, "heads_before", group.queries_before)  # noqa: B010


def _empty(group: Group) -> None:
    """Put constants in the place of what no longer has units."""
    module, part = group.module, group.part
    _replace(module, part.output, attentions.constant(group.reader))
    present = [written for written in part.inputs if architectures.has(module, written.path)]
    if isinstance(part, Attention):
        core = module.get_submodule(part.core)
        for written in present:
            _replace(module, written.path, None)
        attentions.become(core, part.without)
        setattr(core, "output_path", part.output)  # noqa: B010 - mypy: not declared on Module
    else:
        for written in present:
            old = architectures.matrix(module.get_submodule(written.path))
            unread = attentions.Constant(None, old.new_zeros(written.rows.count("n"), 0))
            _replace(module, written.path, unread)
    for left in module.modules():
        # The loader must not initialise by the family's rules what the family would not know.
        setattr(left, "_is_hf_initialized", True)  # noqa: B010


def _replace(module: nn.Module, path: str, new: nn.Module | None) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, new)


def positions(group: Group, numbers: Iterable[int]) -> Tensor:
    """Return where units, by their numbers in the unpruned model, stand now."""
    place = {unit: at for at, unit in enumerate(group.kept)}
    return torch.tensor([place[unit] for unit in numbers], dtype=torch.long)


def _slice(linear: nn.Module, side: Literal["in", "out"], stays: Tensor) -> None:
    """Keep some inputs or outputs of an `nn.Linear` or a `Conv1D`."""
    is_linear = isinstance(linear, nn.Linear)
    index = stays.nonzero().flatten()
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
    groups = [g for g in architectures.groups(model) if g.kept and fractions.get(g.kind)]
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
    for linear, owners in group.writers:
        rows = owners.argsort(stable=True)[(owners < 0).sum() :]  # unit by unit, less the shared
        parts.append(architectures.matrix(linear)[rows].reshape(count, -1))
    return torch.cat(parts, dim=1).detach()


def _repair(group: Group, seen: calibration.Moments, places: Tensor) -> compensation.Repair:
    weight = architectures.matrix(group.reader).detach()
    bias = architectures.bias(group.reader)
    kept = torch.isin(_owners(group), places).nonzero().flatten()
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
