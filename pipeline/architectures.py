"""Where each model family keeps its heads and neurons: one row a family.

Every family is the same underneath: some matrices write the units of a layer and one matrix reads
them. A row names these matrices and how their rows are laid out; the rest of the code works on the
`Group`s that `groups` makes of it and knows no family. Paths in a row are relative: the layers to
the base model, attention and FFN to the layer, matrices to the attention or FFN.

A unit is an attention head or an FFN neuron. In grouped-query attention a head unit is a key/value
head together with its query heads (to drop it is exact, and shrinks the cache), and there are query
heads as units besides: as many may go from every key/value head.

What was cut is recorded in `config.pruning`, in the numbers of the unpruned model, by paths
relative to the base model. All other numbers of the configuration stay those of the unpruned model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline import attentions
from pipeline.attentions import NoAttention

Kind = Literal["heads", "queries", "neurons"]
KINDS: Final[tuple[Kind, ...]] = ("heads", "queries", "neurons")
Size = Literal["queries", "groups", "queries per group", "width"]


@dataclass(frozen=True)
class Matrix:
    """A linear layer that writes units, and the layout of its rows.

    `q`, `k`, `v` are the rows of a key/value head and its queries; `|` stands between blocks that
    each go through all heads. So `q|k|v` is all queries, then all keys, then all values, and `qkv`
    is queries, key and value of the first head, then of the second. `n` is the rows of neurons.
    """

    path: str
    rows: str


@dataclass(frozen=True)
class Attention:
    """An attention of a layer.

    `core` is the module inside `path` that attends, `sizes` its attributes that count heads,
    `mixed` what is mixed into its class when it is cut, `without` when no head is left.
    """

    path: str
    inputs: tuple[Matrix, ...]
    output: str
    core: str = ""
    sizes: Mapping[str, Size] = field(default_factory=dict)
    mixed: type[nn.Module] | None = None
    without: type[NoAttention] = NoAttention


@dataclass(frozen=True)
class Ffn:
    """The feed-forward network of a layer."""

    path: str
    inputs: tuple[Matrix, ...]
    output: str


@dataclass(frozen=True)
class Stack:
    """Layers of one kind, and the configuration's names for their number and that of their heads.

    Attentions that a layer does not have are passed over. `first` says why layer 0 has to stay.
    """

    layers: str
    attentions: tuple[Attention, ...]
    ffn: Ffn
    count: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    groups: str | int = "num_key_value_heads"
    first: str = ""


Architecture = tuple[Stack, ...]


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


def _separate(query: str, key: str, value: str, *more: str) -> tuple[Matrix, ...]:
    """Return the matrices of queries, keys and values, and others laid out as queries are."""
    others = (Matrix(path, "q") for path in more)
    return (Matrix(query, "q"), Matrix(key, "k"), Matrix(value, "v"), *others)


def _neurons(*paths: str) -> tuple[Matrix, ...]:
    return tuple(Matrix(path, "n") for path in paths)


def _bert(inputs: tuple[Matrix, ...]) -> Architecture:
    inner = Attention(
        "attention",
        inputs,
        "output.dense",
        core="self",
        sizes={"num_attention_heads": "queries", "all_head_size": "width"},
        without=attentions.NoAttentionInside,
    )
    ffn = Ffn("", _neurons("intermediate.dense"), "output.dense")
    return (Stack("encoder.layer", (inner, replace(inner, path="crossattention")), ffn),)


_PROJECTIONS = _separate("q_proj", "k_proj", "v_proj")
_BERT = _bert(_separate("self.query", "self.key", "self.value"))
_LLAMA_ATTENTION = Attention(
    "self_attn", _PROJECTIONS, "o_proj", sizes={"num_key_value_groups": "queries per group"}
)
_LLAMA_FFN = Ffn("mlp", _neurons("gate_proj", "up_proj"), "down_proj")
_LLAMA = (Stack("layers", (_LLAMA_ATTENTION,), _LLAMA_FFN),)
_VIT = (
    Stack(
        "layers",
        (Attention("attention", _PROJECTIONS, "o_proj"),),
        Ffn("mlp", _neurons("fc1"), "fc2"),
    ),
)
_FUSED_FFN = Ffn("mlp", _neurons("dense_h_to_4h"), "dense_4h_to_h")


def _bart() -> Architecture:
    inner = Attention("self_attn", _PROJECTIONS, "out_proj", sizes={"num_heads": "queries"})
    ffn = Ffn("", _neurons("fc1"), "fc2")
    both = (inner, replace(inner, path="encoder_attn"))
    return tuple(
        Stack(
            f"{side}.layers",
            both,
            ffn,
            count=f"{side}_layers",
            heads=f"{side}_attention_heads",
            groups="",
        )
        for side in ("encoder", "decoder")
    )


_BART = _bart()
_BIAS_IN_FIRST = "it holds the position bias of all layers"


def _t5() -> Architecture:
    inner = Attention(
        "layer.0.SelfAttention",
        _separate("q", "k", "v"),
        "o",
        sizes={"n_heads": "queries", "inner_dim": "width"},
        mixed=attentions.SharedBias,
        without=attentions.NoAttentionBias,
    )
    dense = "DenseReluDense"
    inputs = _neurons("wi", "wi_0", "wi_1")
    encoder = Stack(
        "encoder.block",
        (inner,),
        Ffn(f"layer.1.{dense}", inputs, "wo"),
        count="num_layers",
        heads="num_heads",
        groups="",
        first=_BIAS_IN_FIRST,
    )
    decoder = replace(
        encoder,
        layers="decoder.block",
        attentions=(inner, replace(inner, path="layer.1.EncDecAttention")),
        ffn=Ffn(f"layer.2.{dense}", inputs, "wo"),
        count="num_decoder_layers",
    )
    return encoder, decoder


def _falcon(config: PretrainedConfig) -> Architecture:
    shares = config.multi_query and not config.new_decoder_architecture
    attention = Attention(
        "self_attention",
        (Matrix("query_key_value", "q|k|v" if shares else "qkv"),),
        "dense",
        sizes={"num_heads": "queries", "num_kv_heads": "groups"},
        mixed=attentions.Alibi,
    )
    groups: str | int = ""
    if config.new_decoder_architecture:
        groups = "num_kv_heads"
    elif config.multi_query:
        groups = 1
    return (Stack("h", (attention,), _FUSED_FFN, groups=groups),)


ARCHITECTURES: Final[Mapping[str, Architecture | Callable[[PretrainedConfig], Architecture]]] = {
    "albert": (
        Stack(
            "encoder.albert_layer_groups",
            (
                Attention(
                    "albert_layers.0.attention",
                    _separate("query", "key", "value"),
                    "dense",
                    sizes={"num_attention_heads": "queries", "all_head_size": "width"},
                    without=attentions.NoAttentionNorm,
                ),
            ),
            Ffn("albert_layers.0", _neurons("ffn"), "ffn_output"),
            count="",
        ),
    ),
    "bart": _BART,
    "bert": _BERT,
    "bloom": (
        Stack(
            "h",
            (
                Attention(
                    "self_attention",
                    (Matrix("query_key_value", "qkv"),),
                    "dense",
                    sizes={"num_heads": "queries"},
                    mixed=attentions.Alibi,
                    without=attentions.NoAttentionResidual,
                ),
            ),
            _FUSED_FFN,
        ),
    ),
    "camembert": _BERT,
    "deberta-v2": _bert(
        _separate(
            "self.query_proj",
            "self.key_proj",
            "self.value_proj",
            "self.pos_key_proj",
            "self.pos_query_proj",
        )
    ),
    "deit": _VIT,
    "distilbert": (
        Stack(
            "transformer.layer",
            (
                Attention(
                    "attention",
                    _separate("q_lin", "k_lin", "v_lin"),
                    "out_lin",
                    sizes={"n_heads": "queries"},
                ),
            ),
            Ffn("ffn", _neurons("lin1"), "lin2"),
            count="n_layers",
        ),
    ),
    "electra": _BERT,
    "falcon": _falcon,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": (
        Stack(
            "h",
            (
                Attention(
                    "attn",
                    (Matrix("c_attn", "q|k|v"),),
                    "c_proj",
                    sizes={"num_heads": "queries", "split_size": "width"},
                ),
            ),
            Ffn("mlp", _neurons("c_fc"), "c_proj"),
        ),
    ),
    "gpt_neox": (
        Stack(
            "layers",
            (Attention("attention", (Matrix("query_key_value", "qkv"),), "dense"),),
            _FUSED_FFN,
        ),
    ),
    "llama": _LLAMA,
    "marian": _BART,
    "mbart": _BART,
    "mistral": _LLAMA,
    "modernbert": (
        Stack(
            "layers",
            (Attention("attn", (Matrix("Wqkv", "q|k|v"),), "Wo"),),
            Ffn("mlp", (Matrix("Wi", "n|n"),), "Wo"),
            first="it is built without a norm that the others have",
        ),
    ),
    "mpnet": (
        Stack(
            "encoder.layer",
            (
                Attention(
                    "attention.attn",
                    _separate("q", "k", "v"),
                    "o",
                    sizes={"num_attention_heads": "queries", "all_head_size": "width"},
                    mixed=attentions.GivenBias,
                ),
            ),
            Ffn("", _neurons("intermediate.dense"), "output.dense"),
        ),
    ),
    "mt5": _t5(),
    "opt": (
        Stack(
            "decoder.layers",
            (Attention("self_attn", _PROJECTIONS, "out_proj", sizes={"num_heads": "queries"}),),
            Ffn("", _neurons("fc1"), "fc2"),
        ),
    ),
    "pegasus": _BART,
    "phi": (
        Stack(
            "layers",
            (replace(_LLAMA_ATTENTION, output="dense"),),
            Ffn("mlp", _neurons("fc1"), "fc2"),
        ),
    ),
    "phi3": (
        Stack(
            "layers",
            (
                Attention(
                    "self_attn",
                    (Matrix("qkv_proj", "q|k|v"),),
                    "o_proj",
                    sizes={
                        "config.num_attention_heads": "queries",
                        "num_key_value_heads": "groups",
                        "num_key_value_groups": "queries per group",
                    },
                ),
            ),
            Ffn("mlp", (Matrix("gate_up_proj", "n|n"),), "down_proj"),
        ),
    ),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "smollm3": _LLAMA,
    "t5": _t5(),
    "vit": _VIT,
    "whisper": _BART,
    "xlm-roberta": _BERT,
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
    row = ARCHITECTURES[family]
    return row(model.config) if callable(row) else row


def stacks(model: PreTrainedModel) -> list[tuple[Stack, nn.ModuleList]]:
    """Return the stacks that this model has, each with its layers."""
    found = []
    for stack in architecture(model):
        if has(model.base_model, stack.layers):
            layers = model.base_model.get_submodule(stack.layers)
            assert isinstance(layers, nn.ModuleList)
            found.append((stack, layers))
    return found


def has(module: nn.Module, path: str) -> bool:
    """Return whether there is such a submodule."""
    try:
        return module.get_submodule(path) is not None
    except AttributeError:
        return False


def record(model: PreTrainedModel) -> dict[str, Any]:
    """Return a copy of what was cut so far: `heads`, `queries`, `neurons` and `layers`."""
    found = getattr(model.config, "pruning", None) or {}
    return {"version": 1} | {
        what: dict(found.get(what, {})) for what in ("heads", "queries", "neurons", "layers")
    }


def groups(model: PreTrainedModel) -> list[Group]:
    """Return the groups of units in module order: attentions, then FFN, of each layer."""
    cut = record(model)
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
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
                where: dict[str, Any] = {"path": prefix + key, "key": key}
                where |= {"layer": number, "module": module}
                if isinstance(part, Ffn):
                    kept, of = _neurons_left(cut, key, module.get_submodule(part.output))
                    found.append(
                        Group("neurons", part=part, kept=kept, of=of, heads=0, queries=0, **where)
                    )
                else:
                    found.extend(_attention(model.config, stack, part, cut, where))
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


def units(model: PreTrainedModel) -> Units:
    """Return what can be cut: dicts, module path -> number of units, in module order.

    Raises:
        ValueError: the model's family has no row, or its weights are quantized.
    """
    found = groups(model)
    of_kind = {
        kind: {group.path: len(group.kept) for group in found if group.kind == kind}
        for kind in KINDS
    }
    return Units(**of_kind)


def matrix(linear: nn.Module) -> Tensor:
    """Return the weight of an `nn.Linear`, or of a GPT-2 `Conv1D` turned over `(O, I)`."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(linear, nn.Linear) else weight.T


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
