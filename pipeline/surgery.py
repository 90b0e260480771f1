"""Cut units and layers out of a model, in place and exactly.

A model without a unit gives the same outputs as the model with that unit's contribution set to
zero. Units are named by their numbers in the unpruned model, however often it is cut, and
`config.pruning` remembers what is left; to cut a unit twice is to cut it once. The cost is a copy
of the matrices that change, one at a time.
"""

import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline import attentions, structure
from pipeline.architectures import Attention, Size, Stack
from pipeline.structure import Group, Kind

Cuts = Mapping[int | str, Iterable[int]]


def cut_layers(model: PreTrainedModel, layers: Iterable[int | str]) -> None:
    """Cut transformer blocks out; `layers` as in `pruning.prune_layers`.

    Raises:
        ValueError: no such layer, none would be left, or it has to stay; nothing is cut then.
    """
    found = {stack.layers: (stack, blocks) for stack, blocks in structure.stacks(model)}
    done = structure.record(model)
    of = {
        path: done["layers"].get(path, {}).get("of", len(blocks))
        for path, (_, blocks) in found.items()
    }
    removed: dict[str, set[int]] = {}
    for named in _listed(layers, "layers"):
        text = named if isinstance(named, str) else str(_whole(named, "layers"))
        path, _, number = text.removeprefix(structure.prefix(model)).rpartition(".")
        path = path or (next(iter(found)) if len(found) == 1 else "")
        if path not in found or not number.isdecimal() or int(number) >= of[path]:
            expected = [f"{path}.0 to {path}.{count - 1}" for path, count in of.items()]
            raise ValueError(f"layers: found {named!r}, expected {' or '.join(expected)}")
        removed.setdefault(path, set()).add(int(number))
    stays = {}
    for path, numbers in removed.items():
        stack, blocks = found[path]
        if bound := why_all_stay(model, stack):
            raise ValueError(f"{path}: found {bound}; none can be cut out")
        known = done["layers"].get(path, {}).get("kept", range(len(blocks)))
        stays[path] = {at: n for at, n in enumerate(known) if n not in numbers}
        if not stays[path]:
            raise ValueError(f"{path}: found all layers, expected at least one to be left")
        if stack.first and 0 in numbers:
            raise ValueError(f"{path}.0: found layer 0, expected another one: {stack.first}")
        _check_shortened(model, stack, len(blocks), [*stays[path]])
    crossing = _crossing(model)
    for path, kept in stays.items():
        _keep_layers(model, found[path][0], found[path][1], kept, of[path])
    _realign(model, crossing)


def why_all_stay(model: PreTrainedModel, stack: Stack) -> str:
    """Return what keeps all layers of a stack where they are, or nothing."""
    if not stack.count:
        return "layers that share their weights"
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        return "attention that is scaled by its layer's number (scale_attn_by_inverse_layer_idx)"
    return ""


def _check_shortened(model: PreTrainedModel, stack: Stack, before: int, stays: list[int]) -> None:
    """Raise ValueError if a model that is built with fewer layers would not take what is left."""
    config = copy.deepcopy(model.config)
    config.pruning = None
    wanted = {}
    layers = f"{structure.prefix(model)}{stack.layers}."
    for name, shape in _shapes(model, config).items():
        at, _, rest = name.removeprefix(layers).partition(".")
        if not name.startswith(layers):
            wanted[name] = shape
        elif int(at) in stays:
            wanted[f"{layers}{stays.index(int(at))}.{rest}"] = shape
    shorten(config, stack, before, stays)
    try:
        # As a file would be read: some families have rules about their numbers.
        built = _shapes(model, type(config).from_dict(config.to_dict()))
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{stack.layers}: no layer can be cut out: {error}") from error
    if built != wanted:
        name = next(n for n in (*wanted, *built) if wanted.get(n) != built.get(n))
        raise ValueError(
            f"{stack.layers}: found {name} of the shape {wanted.get(name)}, expected"
            f" {built.get(name)} in a model with fewer layers; none can be cut out"
        )


def _shapes(model: PreTrainedModel, config: PretrainedConfig) -> dict[str, torch.Size]:
    """Return the shapes of all tensors of a model that its class builds from a configuration."""
    kind: Callable[[PretrainedConfig], PreTrainedModel] = type(model)
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in kind(config).state_dict().items()}


def _keep_layers(
    model: PreTrainedModel, stack: Stack, blocks: nn.ModuleList, stays: dict[int, int], of: int
) -> None:
    """Keep the blocks at the places `stays`, whose values are their numbers, and write it down."""
    done, config, before = structure.record(model), model.config, len(blocks)
    for kind in structure.KINDS:
        moved = {}
        for key, entry in done[kind].items():
            if not key.startswith(f"{stack.layers}."):
                moved[key] = entry
                continue
            at, *rest = key.removeprefix(f"{stack.layers}.").split(".")
            if int(at) in stays:
                moved[".".join([stack.layers, str([*stays].index(int(at))), *rest])] = entry
        done[kind] = moved
    done["layers"][stack.layers] = {"kept": list(stays.values()), "of": of}
    left = [blocks[at] for at in stays]
    del blocks[:]
    blocks.extend(left)
    for index, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # where a decoder keeps this layer's cache
                setattr(module, "layer_idx", index)  # noqa: B010 - mypy: not declared on Module
    shorten(config, stack, before, list(stays))
    config.pruning = done


def shorten(config: PretrainedConfig, stack: Stack, before: int, stays: list[int]) -> None:
    """Tell a configuration that of `before` layers of a stack those at `stays` are left."""
    for name in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        listed = getattr(config, name, None) or ()
        if len(listed) == before:
            setattr(config, name, [listed[at] for at in stays])
    setattr(config, stack.count, len(stays))


def apply(model: PreTrainedModel, record: Mapping[str, Any]) -> None:
    """Cut a model as built from its configuration to what the record says is left.

    Raises:
        ValueError: the record is of another version, or of another model.
    """
    if record.get("version") != 1:
        raise ValueError(
            f"config.json: pruning: found version {record.get('version')}, expected 1;"
            " a newer secateur wrote it"
        )
    for kind in structure.KINDS:
        entries = dict(record.get(kind, {}))
        for group in structure.groups(model):
            if group.kind == kind and group.key in entries:
                kept = set(structure.decode(entries.pop(group.key)["kept"]))
                keep(model, group, [unit for unit in group.kept if unit in kept])
        if entries:
            raise ValueError(f"config.json: pruning: found {next(iter(entries))}, no such module")
    model.config.pruning = structure.record(model) | {"layers": record.get("layers", {})}


def cut(model: PreTrainedModel, kind: Kind, cuts: Cuts) -> None:
    """Cut units of a kind out; `cuts` as in `pruning.prune_heads`.

    Raises:
        ValueError: no such layer, path or unit, or query heads are not cut evenly; nothing is cut.
    """
    found = {group.path: group for group in structure.groups(model) if group.kind == kind}
    planned: dict[str, set[int]] = {}
    if not isinstance(cuts, Mapping):
        raise ValueError(  # noqa: TRY004 - as all that is wrong with cuts
            f"{kind}: found {cuts!r}, expected a mapping, such as {{0: [1, 2]}}"
        )
    for key, numbers in cuts.items():
        path = _path(key if isinstance(key, str) else _whole(key, kind), kind, found)
        listed = _listed(numbers, kind)
        planned.setdefault(path, set()).update(_whole(number, kind) for number in listed)
    for path, removed in planned.items():
        group = found[path]
        if unknown := removed - set(range(group.of)):
            raise ValueError(
                f"{path}: found {kind} {sorted(unknown)}, expected numbers from 0 to {group.of - 1}"
            )
        if kind == "queries":
            _check_even(group, removed)
    for path, removed in planned.items():
        if removed.intersection(found[path].kept):
            keep(model, found[path], [unit for unit in found[path].kept if unit not in removed])


def _path(key: int | str, kind: Kind, found: Mapping[str, Group]) -> str:
    """Return the path of a group that is given by its layer's number, or by its path."""
    if not found:
        none = "no grouped-query attention" if kind == "queries" else f"no {kind}"
        raise ValueError(f"{kind}: found {none}, expected some to cut")
    if isinstance(key, str):
        if key not in found:
            raise ValueError(f"{kind}: found {key!r}, expected one of {list(found)}")
        return key
    paths = [path for path, group in found.items() if group.layer == key]
    if not paths:
        layers = sorted({group.layer for group in found.values()})
        raise ValueError(f"{kind}: found {key!r}, expected one of {layers}")
    if len(paths) > 1:
        raise ValueError(
            f"{kind}: found layer {key}, which has several, expected one of the paths {paths}"
        )
    return paths[0]


def _listed(numbers: Any, what: str) -> list[Any]:
    """Return what was given as a list; one number, or text, is none."""
    if isinstance(numbers, str | bytes):
        raise ValueError(f"{what}: found {numbers!r}, expected a list of numbers")  # noqa: TRY004
    try:
        return list(numbers)
    except TypeError as error:
        raise ValueError(f"{what}: found {numbers!r}, expected a list of numbers") from error


def _whole(number: Any, what: str) -> int:
    """Return the int that a number of Python, NumPy or torch is."""
    try:
        if isinstance(number, bool):
            raise TypeError  # noqa: TRY301 - though Python takes True for 1
        return operator.index(number)
    except TypeError as error:
        raise ValueError(f"{what}: found {number!r}, expected whole numbers") from error


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


def keep(model: PreTrainedModel, group: Group, stays: list[int]) -> None:
    """Keep the units `stays` of the group, and write it down."""
    crossing = _crossing(model)
    with torch.device("cpu"):  # a model that is being loaded is built on no device
        _take_out(model, group, stays)
    _realign(model, crossing)


def _crossing(model: PreTrainedModel) -> dict[tuple[int, int], tuple[int, int]]:
    """Return layer and head of each cross-attention's heads, as now -> as in the unpruned model.

    Whisper alone asks for it, to time words by the attention of `alignment_heads`.
    """
    if not hasattr(getattr(model, "generation_config", None), "alignment_heads"):
        return {}
    return {
        (int(group.key.split(".")[-2]), place): (group.layer, unit)
        for group in structure.groups(model)
        if (group.part.path, group.kind) == ("encoder_attn", "heads")
        for place, unit in enumerate(group.kept)
    }


def _realign(model: PreTrainedModel, before: Mapping[tuple[int, int], tuple[int, int]]) -> None:
    """Number the alignment heads anew, and drop them where a layer no longer attends."""
    if not before:
        return
    config: Any = model.generation_config
    now = {number: place for place, number in _crossing(model).items()}
    numbers = [before.get((layer, head)) for layer, head in config.alignment_heads or ()]
    left = [list(now[number]) for number in numbers if number in now]
    if left and len({layer for layer, _ in now.values()}) == model.config.decoder_layers:
        config.alignment_heads = left
    else:  # the library says that there are none
        del config.alignment_heads


def _take_out(model: PreTrainedModel, group: Group, stays: list[int]) -> None:
    if not group.kept:
        return
    if stays:
        places = _positions(group, stays)
        for linear, owner in group.writers:
            _slice(linear, "out", torch.isin(owner, torch.cat([places, -places.new_ones(1)])))
        _slice(group.reader, "in", torch.isin(owners(group), places))
    else:
        _empty(group)
    done = structure.record(model)
    kept = structure.encode(tuple(stays), group.of)
    done[group.kind][group.key] = {"kept": kept, "of": group.of}
    if group.kind == "heads" and group.key in done["queries"]:
        # Their queries went with the heads; the record does not depend on what was cut first.
        each, of = group.queries_before // group.of, group.queries_before
        queries = [query for query in group.kept_queries if query // each in set(stays)]
        done["queries"][group.key] = {"kept": structure.encode(tuple(queries), of), "of": of}
        if not queries:
            del done["queries"][group.key]
    model.config.pruning = done
    if stays and isinstance(group.part, Attention):
        after = next(
            g for g in structure.groups(model) if (g.key, g.kind) == (group.key, group.kind)
        )
        _resize(model, after, group.part)


def owners(group: Group) -> Tensor:
    """Return for each of the reader's inputs the place of its unit."""
    return torch.arange(len(group.kept)).repeat_interleave(group.width)


def _resize(model: PreTrainedModel, group: Group, part: Attention) -> None:
    """Tell an attention how many heads it has now, and which."""
    core = group.module.get_submodule(part.core)
    counts: dict[Size, int] = {
        "queries": group.queries,
        "groups": group.heads,
        "queries per group": group.queries // group.heads,
        "width": structure.matrix(group.reader).shape[1],
    }
    for name, meaning in part.sizes.items():
        if name.startswith("config."):
            own = {name.removeprefix("config."): counts[meaning]}
            setattr(core, "config", attentions.LayerConfig(model.config, **own))  # noqa: B010
        elif hasattr(core, name):
            setattr(core, name, counts[meaning])
    if part.mixed is not None:
        attentions.become(core, part.mixed)
        setattr(core, "kept_heads", list(group.kept_queries))  # noqa: B010
        setattr(core, "heads_before", group.queries_before)  # noqa: B010


def _empty(group: Group) -> None:
    """Put constants in the place of what no longer has units."""
    module, part = group.module, group.part
    _replace(module, part.output, attentions.constant(group.reader))
    present = [written for written in part.inputs if structure.has(module, written.path)]
    if isinstance(part, Attention):
        core = module.get_submodule(part.core)
        for written in present:
            _replace(module, written.path, None)
        attentions.become(core, part.without)
        setattr(core, "output_path", part.output)  # noqa: B010 - mypy: not declared on Module
    else:
        for written in present:
            old = structure.matrix(module.get_submodule(written.path))
            unread = attentions.Constant(None, old.new_zeros(written.rows.count("n"), 0))
            _replace(module, written.path, unread)
    for left in module.modules():
        # The loader must not initialise by the family's rules what the family would not know.
        setattr(left, "_is_hf_initialized", True)  # noqa: B010


def _replace(module: nn.Module, path: str, new: nn.Module | None) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, new)


def _positions(group: Group, numbers: Iterable[int]) -> Tensor:
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
    outputs, inputs = structure.matrix(linear).shape
    names = ("in_features", "out_features") if is_linear else ("nx", "nf")
    for name, size in zip(names, (inputs, outputs), strict=True):
        setattr(linear, name, size)


def _keep(module: nn.Module, name: str, axis: int, index: Tensor) -> None:
    old = getattr(module, name)
    new = old.detach().index_select(axis, index.to(old.device))
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
