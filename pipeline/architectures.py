"""Where each model family keeps its heads and neurons: one row a family.

Every family is the same underneath: some matrices write the units of a layer, side by side, and
one matrix reads them. A row names these matrices; the rest of the code works on the `Group`s that
`groups` makes of it and knows no family. Paths in a row are relative: the layers to the base
model, attention and FFN to the layer, matrices to the attention or FFN.

A unit is an attention head or an FFN neuron. In grouped-query attention a head unit is a key/value
head together with its query heads: to drop it is exact, and shrinks the cache.

What was cut is recorded in `config.pruning`, in the numbers of the unpruned model, by paths
relative to the base model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

Kind = Literal["heads", "neurons"]


@dataclass(frozen=True)
class Matrix:
    """A linear layer whose outputs are units, one after the other, `blocks` times over."""

    path: str
    blocks: int = 1


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its units; `sizes` are attributes of an attention that count them."""

    layers: str
    attention: str
    attention_in: tuple[Matrix, ...]
    attention_out: str
    ffn: str
    ffn_in: tuple[Matrix, ...]
    ffn_out: str
    sizes: Mapping[str, Literal["units", "width"]]


@dataclass(frozen=True)
class Group:
    """The units of one attention or one FFN, as they are now.

    `path` is the module's name in the model, `key` its name in the record, `kept` the units that
    are left, by their numbers in the unpruned model, where there were `of`.
    """

    kind: Kind
    path: str
    key: str
    layer: int
    module: nn.Module
    inputs: tuple[Matrix, ...]
    output: str
    sizes: Mapping[str, Literal["units", "width"]]
    kept: tuple[int, ...]
    of: int

    @property
    def width(self) -> int:
        """The number of the reader's inputs that belong to one unit."""
        return matrix(self.reader).shape[1] // len(self.kept)

    @property
    def reader(self) -> nn.Module:
        """The matrix that reads the units: the output projection, or the second FFN matrix."""
        return self.module.get_submodule(self.output)


@dataclass(frozen=True)
class Units:
    """What can be cut: module path -> number of units, in module order."""

    heads: dict[str, int]
    neurons: dict[str, int]


_BERT = Architecture(
    layers="encoder.layer",
    attention="attention",
    attention_in=(Matrix("self.query"), Matrix("self.key"), Matrix("self.value")),
    attention_out="output.dense",
    ffn="",
    ffn_in=(Matrix("intermediate.dense"),),
    ffn_out="output.dense",
    sizes={"self.num_attention_heads": "units", "self.all_head_size": "width"},
)

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": Architecture(
        layers="transformer.layer",
        attention="attention",
        attention_in=(Matrix("q_lin"), Matrix("k_lin"), Matrix("v_lin")),
        attention_out="out_lin",
        ffn="ffn",
        ffn_in=(Matrix("lin1"),),
        ffn_out="lin2",
        sizes={"n_heads": "units"},
    ),
    "gpt2": Architecture(
        layers="h",
        attention="attn",
        attention_in=(Matrix("c_attn", blocks=3),),
        attention_out="c_proj",
        ffn="mlp",
        ffn_in=(Matrix("c_fc"),),
        ffn_out="c_proj",
        sizes={"num_heads": "units", "split_size": "width"},
    ),
    "llama": Architecture(
        layers="layers",
        attention="self_attn",
        attention_in=(Matrix("q_proj"), Matrix("k_proj"), Matrix("v_proj")),
        attention_out="o_proj",
        ffn="mlp",
        ffn_in=(Matrix("gate_proj"), Matrix("up_proj")),
        ffn_out="down_proj",
        sizes={},
    ),
}


def architecture(model: PreTrainedModel) -> Architecture:
    """Return the row of the model's family.

    Raises:
        ValueError: there is no row for it, or its weights are quantized.
    """
    family = model.config.model_type
    if family not in ARCHITECTURES:
        raise ValueError(
            f"{type(model).__name__}: found the family {family!r}, expected one of"
            f" {sorted(ARCHITECTURES)}; a row in pipeline/architectures.py adds a family"
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"{type(model).__name__}: found quantized weights, expected floating point;"
            " prune before quantizing"
        )
    return ARCHITECTURES[family]


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the transformer blocks."""
    found = model.base_model.get_submodule(architecture(model).layers)
    assert isinstance(found, nn.ModuleList)
    return found


def record(model: PreTrainedModel) -> dict[str, Any]:
    """Return a copy of what was cut so far: `heads`, `neurons` and `layers`."""
    found = getattr(model.config, "pruning", None) or {}
    return {
        "version": 1,
        "heads": dict(found.get("heads", {})),
        "neurons": dict(found.get("neurons", {})),
        "layers": found.get("layers"),
    }


def groups(model: PreTrainedModel) -> list[Group]:
    """Return the groups of units in module order: attention, then FFN, of each layer."""
    row, cut = architecture(model), record(model)
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    kept_layers = cut["layers"]["kept"] if cut["layers"] else range(len(layers(model)))
    found = []
    for index, (layer, number) in enumerate(zip(layers(model), kept_layers, strict=True)):
        parts: tuple[tuple[Kind, str, tuple[Matrix, ...], str], ...] = (
            ("heads", row.attention, row.attention_in, row.attention_out),
            ("neurons", row.ffn, row.ffn_in, row.ffn_out),
        )
        for kind, name, inputs, output in parts:
            key = f"{row.layers}.{index}" + (f".{name}" if name else "")
            module = layer.get_submodule(name)
            known = cut[kind].get(key)
            kept = (
                decode(known["kept"])
                if known
                else tuple(range(_count(model, kind, module.get_submodule(output))))
            )
            found.append(
                Group(
                    kind=kind,
                    path=prefix + key,
                    key=key,
                    layer=number,
                    module=module,
                    inputs=inputs,
                    output=output,
                    sizes=row.sizes if kind == "heads" else {},
                    kept=kept,
                    of=known["of"] if known else len(kept),
                )
            )
    return found


def units(model: PreTrainedModel) -> Units:
    """Return what can be cut: two dicts, module path -> number of units, in module order.

    Raises:
        ValueError: the model's family has no row, or its weights are quantized.
    """
    found = groups(model)
    return Units(
        heads={group.path: len(group.kept) for group in found if group.kind == "heads"},
        neurons={group.path: len(group.kept) for group in found if group.kind == "neurons"},
    )


def matrix(linear: nn.Module) -> Tensor:
    """Return the weight of an `nn.Linear`, or of a GPT-2 `Conv1D` turned over `(O, I)`."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(linear, nn.Linear) else weight.T


def bias(linear: nn.Module) -> Tensor | None:
    """Return the bias of an `nn.Linear` or a `Conv1D` `(O,)`, or None where it has none."""
    found: Tensor | None = getattr(linear, "bias", None)
    return found


def _count(model: PreTrainedModel, kind: Kind, reader: nn.Module) -> int:
    if kind == "neurons":
        return matrix(reader).shape[1]
    queries: int = model.config.num_attention_heads
    # Some families have the attribute and leave it None.
    key_values: int | None = getattr(model.config, "num_key_value_heads", None)
    return queries if key_values is None else key_values


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
