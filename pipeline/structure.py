"""The units of a model as it is now: heads, query heads, neurons, and what has been cut.

A unit is an attention head or an FFN neuron. In grouped-query attention a head unit is a key/value
head together with its query heads (to drop it is exact, and shrinks the cache), and there are query
heads as units besides: as many may go from every key/value head.

What was cut is recorded in `config.pruning`, in the numbers of the unpruned model, by paths
relative to the base model. All other numbers of the configuration stay those of the unpruned model.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline import attentions
from pipeline.architectures import ARCHITECTURES, Architecture, Attention, Ffn, Stack, borrowed

Kind = Literal["heads", "queries", "neurons"]
KINDS: Final[tuple[Kind, ...]] = ("heads", "queries", "neurons")
LEARNED: Final[dict[str, str]] = {}
"""Models of families that are not in the table, by `fingerprint` -> the family whose row fits."""


@dataclass(frozen=True)
class Group:
    """The units of one attention or one FFN, as they are now.

    `path` is the module's name in the model, `key` its name in the record, `kept` the units that
    are left, by their numbers in the unpruned model, where there were `of`. `heads` is the number
    of key/value heads, `queries` that of query heads, `kept_queries` their numbers in the unpruned
    model, which had `queries_before`; all this is empty for neurons.
    """

    kind: Kind
    path: str
    key: str
    layer: int
    module: nn.Module
    part: Attention | Ffn
    kept: tuple[int, ...]
    of: int
    heads: int
    queries: int
    kept_queries: tuple[int, ...] = ()
    queries_before: int = 0

    @property
    def width(self) -> int:
        """The number of the reader's inputs that belong to one unit."""
        return matrix(self.reader).shape[1] // len(self.kept)

    @property
    def reader(self) -> nn.Module:
        """The matrix that reads the units: the output projection, or the second FFN matrix."""
        return self.module.get_submodule(self.part.output)

    @property
    def writers(self) -> list[tuple[nn.Module, Tensor]]:
        """The matrices that write the units, and for each of their rows the place of its unit.

        A row that no unit of this kind owns has the place -1.
        """
        found = []
        for written in self.part.inputs:
            if has(self.module, written.path):
                linear = self.module.get_submodule(written.path)
                found.append((linear, self._places(written.rows, matrix(linear).shape[0])))
        return found

    def _places(self, rows: str, total: int) -> Tensor:
        blocks = []
        for block in rows.split("|"):
            if self.kind == "neurons":
                blocks.append(torch.arange(len(self.kept)))
                continue
            head, query = torch.arange(self.heads)[:, None], torch.arange(self.queries)
            each = query.reshape(self.heads, -1)
            of = {
                "heads": {"q": head.expand_as(each), "kv": head},
                "queries": {"q": each, "kv": torch.full_like(head, -1)},
            }[self.kind]
            columns = [of["q" if letter == "q" else "kv"] for letter in block]
            blocks.append(torch.cat(columns, dim=1).flatten())
        places = torch.cat(blocks)
        return places.repeat_interleave(total // len(places))


@dataclass(frozen=True)
class Units:
    """What can be cut: module path -> number of units, in module order.

    `queries` holds those attentions only whose query heads share key/value heads.
    """

    heads: dict[str, int]
    queries: dict[str, int]
    neurons: dict[str, int]


def architecture(model: PreTrainedModel) -> Architecture:
    """Return the row of the model's family.

    Raises:
        ValueError: there is no row for it, or not for its layout, or its weights are quantized.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"{type(model).__name__}: found quantized weights, expected floating point;"
            " prune before quantizing"
        )
    family = model.config.model_type
    if (other := like(model)) is not None:
        return borrowed(other)
    if family not in ARCHITECTURES:
        raise ValueError(
            f"{type(model).__name__}: found the family {family!r}, expected one of"
            f" {sorted(ARCHITECTURES)}; a row in pipeline/architectures.py adds a family"
        )
    row = ARCHITECTURES[family]
    return row(model.config) if callable(row) else row


def like(model: PreTrainedModel) -> str | None:
    """Return the family whose row fits a model that has none of its own, if that was found out."""
    if model.config.model_type in ARCHITECTURES:
        return None
    cut: Mapping[str, Any] = getattr(model.config, "pruning", None) or {}
    return cut.get("like") or LEARNED.get(fingerprint(model))


def fingerprint(model: PreTrainedModel) -> str:
    """Return the model's class and configuration, all that its modules depend on."""
    config = model.config.to_dict()
    config.pop("pruning", None)
    return f"{type(model).__name__} {json.dumps(config, sort_keys=True, default=str)}"


def stacks(model: PreTrainedModel) -> list[tuple[Stack, nn.ModuleList]]:
    """Return the stacks that this model has, each with its layers."""
    found = []
    for stack in architecture(model):
        if has(model.base_model, stack.layers):
            layers = model.base_model.get_submodule(stack.layers)
            assert isinstance(layers, nn.ModuleList)
            found.append((stack, layers))
    return found


def prefix(model: PreTrainedModel) -> str:
    """Return what stands before the base model's paths in the model's."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def has(module: nn.Module, path: str) -> bool:
    """Return whether there is such a submodule."""
    try:
        return module.get_submodule(path) is not None
    except AttributeError:
        return False


def record(model: PreTrainedModel) -> dict[str, Any]:
    """Return a copy of what was cut so far: `heads`, `queries`, `neurons` and `layers`.

    Where the family has no row, `like` says whose row it was cut by.
    """
    found = getattr(model.config, "pruning", None) or {}
    other = like(model)
    return (
        {"version": 1}
        | ({"like": other} if other else {})
        | {what: dict(found.get(what, {})) for what in ("heads", "queries", "neurons", "layers")}
    )


def groups(model: PreTrainedModel) -> list[Group]:
    """Return the groups of units in module order: attentions, then FFN, of each layer.

    Raises:
        ValueError: there is no row for the model, or a matrix is wrapped in something else.
    """
    cut = record(model)
    found = []
    for stack, layers in stacks(model):
        numbers = cut["layers"].get(stack.layers, {}).get("kept", range(len(layers)))
        for index, (layer, number) in enumerate(zip(layers, numbers, strict=True)):
            parts: tuple[Attention | Ffn, ...] = (*stack.attentions, stack.ffn)
            for part in parts:
                if not has(layer, part.path):
                    continue
                key = f"{stack.layers}.{index}" + (f".{part.path}" if part.path else "")
                module = layer.get_submodule(part.path)
                _check_types(module, part, prefix(model) + key)
                where: dict[str, Any] = {"path": prefix(model) + key, "key": key}
                where |= {"layer": number, "module": module}
                if isinstance(part, Ffn):
                    kept, of = _neurons_left(cut, key, module.get_submodule(part.output))
                    found.append(
                        Group("neurons", part=part, kept=kept, of=of, heads=0, queries=0, **where)
                    )
                else:
                    found.extend(_attention(model.config, stack, part, cut, where))
    return found


def _check_types(module: nn.Module, part: Attention | Ffn, path: str) -> None:
    """Raise ValueError if a matrix is not one that can be sliced."""
    for name in (part.output, *(written.path for written in part.inputs)):
        if has(module, name):
            found = module.get_submodule(name)
            if not isinstance(found, nn.Linear | Conv1D | attentions.Constant):
                raise ValueError(
                    f"{path}.{name}: found a {type(found).__name__}, expected an nn.Linear or a"
                    " Conv1D; merge adapters first"
                )


def left(model: PreTrainedModel, kind: Kind) -> list[tuple[int, ...]]:
    """Return what is left of every group of a kind, by the layers of the unpruned model.

    Of a layer that was cut out nothing is.
    """
    cut = record(model)["layers"]
    of_kind = [group for group in groups(model) if group.kind == kind]
    found: list[tuple[int, ...]] = []
    for stack, layers in stacks(model):
        count = cut.get(stack.layers, {}).get("of", len(layers))
        by_layer: list[list[tuple[int, ...]]] = [[] for _ in range(count)]
        for group in of_kind:
            if group.key.startswith(f"{stack.layers}."):
                by_layer[group.layer].append(group.kept)
        most = max(map(len, by_layer), default=0)
        for of_layer in by_layer:
            found += of_layer or [()] * most
    return found


def _neurons_left(cut: dict[str, Any], key: str, reader: nn.Module) -> tuple[tuple[int, ...], int]:
    if key in cut["neurons"]:
        return decode(cut["neurons"][key]["kept"]), cut["neurons"][key]["of"]
    count = matrix(reader).shape[1]
    return tuple(range(count)), count


def _attention(
    config: PretrainedConfig,
    stack: Stack,
    part: Attention,
    cut: dict[str, Any],
    where: dict[str, Any],
) -> list[Group]:
    """Return the heads of an attention, and its query heads if they share key/value heads."""
    queries: int = getattr(config, stack.heads)
    # Some families have the attribute and leave it None.
    named = stack.groups if isinstance(stack.groups, int) else getattr(config, stack.groups, None)
    heads: int = named or queries
    known = {
        kind: decode(cut[kind][where["key"]]["kept"])
        if where["key"] in cut[kind]
        else tuple(range(of))
        for kind, of in (("heads", heads), ("queries", queries))
    }
    each = queries // heads
    left = tuple(query for query in known["queries"] if query // each in set(known["heads"]))
    sizes: dict[str, Any] = {"part": part, "heads": len(known["heads"]), "queries": len(left)}
    sizes |= {"kept_queries": left, "queries_before": queries}
    found = [Group("heads", kept=known["heads"], of=heads, **sizes, **where)]
    if each > 1:
        found.append(Group("queries", kept=left, of=queries, **sizes, **where))
    return found


def matrix(linear: nn.Module) -> Tensor:
    """Return the weight of an `nn.Linear`, or of a GPT-2 `Conv1D` turned over `(O, I)`."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(linear, nn.Linear) else weight.T


def by_unit(group: Group, of: Callable[[nn.Module], Tensor] = matrix) -> Tensor:
    """Return all parameters of each unit, or what else is as large as they are `(U, P)`.

    `of` gives the matrix `(O, I)` of a module that writes or reads the units.
    """
    count = len(group.kept)
    parts = [of(group.reader).T.reshape(count, -1)]
    for linear, owners in group.writers:
        rows = owners.argsort(stable=True)[(owners < 0).sum() :]  # unit by unit, less the shared
        parts.append(of(linear)[rows].reshape(count, -1))
    return torch.cat(parts, dim=1).detach()


def bias(linear: nn.Module) -> Tensor | None:
    """Return the bias of an `nn.Linear` or a `Conv1D` `(O,)`, or None where it has none."""
    found: Tensor | None = getattr(linear, "bias", None)
    return found


def encode(kept: tuple[int, ...], of: int) -> list[int] | str:
    """Return kept units for the record: a list, or for many a bit mask in hexadecimal."""
    if of <= 256:  # noqa: PLR2004 - heads are listed, to be read by people
        return list(kept)
    mask = sum(1 << unit for unit in kept)
    return f"{mask:x}"


def decode(kept: list[int] | str) -> tuple[int, ...]:
    """Return the kept units that `encode` wrote."""
    if isinstance(kept, str):
        mask = int(kept, 16)
        return tuple(unit for unit in range(mask.bit_length()) if mask >> unit & 1)
    return tuple(kept)
