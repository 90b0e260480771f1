"""What attention becomes when a cut needs more than smaller matrices.

A module keeps its weights and its place; only its class changes, to one of these mixed with its
own. Two things call for it: a position bias that the model makes for all heads of all layers at
once, of which a cut layer wants its own heads' part; and a layer without heads, which no longer
attends at all.

B batch, H heads of the unpruned layer, L queries, T keys.
"""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache


class Constant(nn.Module):
    """A matrix without inputs: its bias, or zeros, whatever comes in.

    Its weight `(O, 0)` is saved, so that a class that expects another one refuses the file.
    """

    bias: nn.Parameter | None

    def __init__(self, bias: nn.Parameter | None, weight: Tensor) -> None:
        super().__init__()
        self.register_parameter("bias", bias)
        self.register_buffer("weight", weight)
        self.outputs = len(weight)

    def forward(self, states: Tensor) -> Tensor:
        """Return the bias for every token of states `(B, L, any)`: `(B, L, outputs)`."""
        bias = states.new_zeros(self.outputs) if self.bias is None else self.bias
        return bias.expand(*states.shape[:-1], -1).clone()  # some layers add to it in place


class LayerConfig:
    """The model's configuration with a layer's own numbers; whatever else is read is the model's.

    A copy would no longer see what is set on the model's later, such as the attention function.
    """

    def __init__(self, config: Any, **own: int) -> None:
        self.__dict__.update(own, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


class SharedBias(nn.Module):
    """T5: the first layer makes the bias `(1, H, L, T)` and every layer hands it on, whole."""

    kept_heads: list[int]

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the part of this layer's heads; `forward` finds the whole of it in `_whole`."""
        self._whole = super().compute_bias(*args, **kwargs)  # type: ignore[misc]
        whole: Tensor = self._whole
        return whole[:, self.kept_heads]

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Attend with the bias of the heads that are left, and return the bias of all."""
        crosses = key_value_states is not None  # its bias is zeros, made for its own heads
        bias = None if crosses or position_bias is None else position_bias[:, self.kept_heads]
        states, _, weights = super().forward(
            hidden_states, mask, key_value_states, position_bias=bias, **kwargs
        )
        if position_bias is None and not crosses:
            position_bias = self.__dict__.pop("_whole", None)
        return states, position_bias, weights


class GivenBias(nn.Module):
    """MPNet: the encoder gives every layer the bias of all heads `(B, H, L, L)`."""

    kept_heads: list[int]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Attend with the bias of the heads that are left."""
        if position_bias is not None:
            position_bias = position_bias[:, self.kept_heads]
        return super().forward(hidden_states, attention_mask, position_bias, **kwargs)


class Alibi(nn.Module):
    """BLOOM, Falcon: the model makes the slopes of all heads, `(B H, 1, T)`, for every layer.

    A head's slope depends on its number among the heads that there were.
    """

    kept_heads: list[int]
    heads_before: int

    def forward(
        self,
        *args: Any,
        alibi: Tensor | None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Attend with the slopes of the heads that are left."""
        if alibi is not None:
            each = alibi.reshape(-1, self.heads_before, *alibi.shape[-2:])[:, self.kept_heads]
            alibi = each.reshape(-1, *alibi.shape[-2:])
            if attention_mask is not None and attention_mask.shape[1] == self.heads_before > 1:
                attention_mask = attention_mask[:, self.kept_heads]  # Falcon adds the slopes to it
        return super().forward(*args, alibi=alibi, attention_mask=attention_mask, **kwargs)


class NoAttention(nn.Module):
    """A layer without heads: the bias of its output projection."""

    output_path: str
    layer_idx: int

    def constant(self, states: Tensor) -> Tensor:
        """Return what the output projection still gives, `(B, L, O)`."""
        found: Tensor = self.get_submodule(self.output_path)(states)
        return found

    def hold_place(self, states: Tensor, kwargs: dict[str, Any]) -> int:
        """Write zeros into this layer's cache, and return how many keys a head would see.

        The library asks some layers' caches, among them the first one's, how many tokens have been
        seen; an empty one would say none.
        """
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        crosses = [kwargs.get("key_value_states"), kwargs.get("encoder_hidden_states")]
        if cache is None or any(given is not None for given in crosses):
            return states.shape[1]
        zeros = states.new_zeros(states.shape[0], 1, states.shape[1], 1)
        keys: Tensor = cache.update(zeros, zeros, self.layer_idx)[0]
        return keys.shape[-2]

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the constant, and no weights."""
        self.hold_place(hidden_states, kwargs)
        return self.constant(hidden_states), None


class NoAttentionInside(NoAttention):
    """BERT: the output projection stands behind the module that attends, and adds the residual."""

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the states as they are; what follows makes a constant of them."""
        self.hold_place(hidden_states, kwargs)
        return hidden_states, None


class NoAttentionResidual(NoAttention):
    """BLOOM: the attention adds the residual."""

    def forward(
        self, hidden_states: Tensor, residual: Tensor, *_: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Return the constant and the residual."""
        self.hold_place(hidden_states, kwargs)
        return residual + self.constant(hidden_states), None


class NoAttentionNorm(NoAttention):
    """ALBERT: the attention adds the residual and norms."""

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the normed states and constant."""
        self.hold_place(hidden_states, kwargs)
        norm = self.get_submodule("LayerNorm")
        return norm(hidden_states + self.constant(hidden_states)), None


class NoAttentionBias(NoAttention):
    """T5: the first layer makes the position bias of all layers, with heads or without."""

    has_relative_attention_bias: bool

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *_: Any,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Return the constant, and the bias `(1, H, L, T)` for the layers behind."""
        keys = self.hold_place(hidden_states, kwargs)
        if position_bias is None and self.has_relative_attention_bias:
            length = hidden_states.shape[1]
            position_bias = self.compute_bias(  # type: ignore[operator]
                length, keys, device=hidden_states.device, past_seen_tokens=keys - length
            )
        return self.constant(hidden_states), position_bias, None


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Mix `kind` into the module's class, in place of what was mixed in before."""
    own = type(module)
    if own.__dict__.get("_mixed"):
        own = own.__bases__[1]
    module.__class__ = type(
        own.__name__, (kind, own), {"__module__": own.__module__, "_mixed": True}
    )


def constant(linear: nn.Module) -> Constant:
    """Return what is left of a linear layer `(O, I)` when none of its inputs is."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    outputs = weight.shape[0 if isinstance(linear, nn.Linear) else 1]
    return Constant(getattr(linear, "bias", None), weight.new_zeros(outputs, 0))
