"""Where each model family keeps its heads and neurons: one row a family.

Every family is the same underneath: some matrices write the units of a layer and one matrix reads
them. A row names these matrices and how their rows are laid out; `structure.py` makes of it what
the rest of the code works on, which knows no family. Paths in a row are relative: the layers to the
base model, attention and FFN to the layer, matrices to the attention or FFN.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from torch import nn
from transformers import PretrainedConfig

from pipeline import attentions
from pipeline.attentions import NoAttention

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
    """Layers of one kind, and the configuration's names for their number and their units'.

    Attentions that a layer does not have are passed over. `first` says why layer 0 has to stay.
    """

    layers: str
    attentions: tuple[Attention, ...]
    ffn: Ffn
    count: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    groups: str | int = "num_key_value_heads"
    neurons: str = "intermediate_size"
    first: str = ""


Architecture = tuple[Stack, ...]


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


def _albert(config: PretrainedConfig) -> Architecture:
    if config.inner_group_num > 1:
        raise ValueError(
            f"AlbertConfig: found inner_group_num {config.inner_group_num}, expected 1; groups of"
            " several layers are not known here"
        )
    attention = Attention(
        "albert_layers.0.attention",
        _separate("query", "key", "value"),
        "dense",
        sizes={"num_attention_heads": "queries", "all_head_size": "width"},
        without=attentions.NoAttentionNorm,
    )
    ffn = Ffn("albert_layers.0", _neurons("ffn"), "ffn_output")
    return (Stack("encoder.albert_layer_groups", (attention,), ffn, count=""),)


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
            neurons=f"{side}_ffn_dim",
        )
        for side in ("encoder", "decoder")
    )


_BART = _bart()


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
        neurons="d_ff",
        first="it holds the position bias of all layers",
    )
    decoder = replace(
        encoder,
        layers="decoder.block",
        attentions=(inner, replace(inner, path="layer.1.EncDecAttention")),
        ffn=Ffn(f"layer.2.{dense}", inputs, "wo"),
        count="num_decoder_layers",
    )
    return encoder, decoder


def _gpt2() -> Architecture:
    inner = Attention(
        "attn",
        (Matrix("c_attn", "q|k|v"),),
        "c_proj",
        sizes={"num_heads": "queries", "split_size": "width"},
    )
    crossed = replace(
        inner, path="crossattention", inputs=(Matrix("q_attn", "q"), Matrix("c_attn", "k|v"))
    )
    ffn = Ffn("mlp", _neurons("c_fc"), "c_proj")
    return (Stack("h", (inner, crossed), ffn, neurons="n_inner"),)


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
    return (Stack("h", (attention,), _FUSED_FFN, groups=groups, neurons="ffn_hidden_size"),)


ARCHITECTURES: Final[Mapping[str, Architecture | Callable[[PretrainedConfig], Architecture]]] = {
    "albert": _albert,
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
            neurons="hidden_dim",
        ),
    ),
    "electra": _BERT,
    "falcon": _falcon,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": _gpt2(),
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
            neurons="ffn_dim",
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
SIZES: Final[Mapping[str, Size]] = {
    "num_heads": "queries",
    "num_attention_heads": "queries",
    "n_heads": "queries",
    "num_key_value_heads": "groups",
    "num_kv_heads": "groups",
    "num_key_value_groups": "queries per group",
    "all_head_size": "width",
}
"""What attributes that count heads are usually called; set where an attention has them."""


def borrowed(name: str) -> Architecture:
    """Return a family's row for another family, which may count heads by other attributes.

    Raises:
        ValueError: there is no such row to borrow.
    """
    row = ARCHITECTURES.get(name)
    if row is None or callable(row):
        raise ValueError(f"config.json: pruning: found the row {name!r}, which is not known here")
    return tuple(
        replace(
            stack,
            attentions=tuple(replace(a, sizes={**SIZES, **a.sizes}) for a in stack.attentions),
        )
        for stack in row
    )
