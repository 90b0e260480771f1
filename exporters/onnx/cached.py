"""Models that generate, as graphs that take and give a key-value cache.

A decoder is one graph: it reads a prompt when the cache that it is given is empty (P = 0), and goes
on from what it gave before when it is not. An encoder-decoder is two, which share no weight but the
embeddings: the encoder gives the keys and values that the cross-attentions will read, once for an
input, and the decoder takes them beside its own cache. Names and shapes of a layer N:

    past_key_values.N.key, .value             (B, H, P, D)      decoder
    present.N.key, .value                     (B, H, P + L, D)
    past_key_values.N.decoder.key, .value     (B, H, P, D)      decoder of an encoder-decoder
    present.N.decoder.key, .value             (B, H, P + L, D)
    past_key_values.N.encoder.key, .value     (B, H, T, D)      given by the encoder as present.N

B batch, H key heads of the layer, P tokens before, L tokens, T tokens of the encoder, D width of a
head. A layer without heads keeps its place with one head of width 1.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from exporters import ExportError
from exporters.onnx import graph
from exporters.onnx.graph import Axes
from exporters.onnx.session import encoder_file

Pair = dict[str, Tensor]
TOTAL = "past_sequence + sequence"
ROWS, PAST, LENGTH = 2, 5, 7
"""Sizes of what is traced."""


class _Calls(nn.Module):
    """What calls a model; a graph is traced from tensors to tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.called, self.config = model, model.config


class Decoder(_Calls):
    """A causal language model."""

    def forward(
        self, past_key_values: Mapping[str, Pair], **given: Tensor
    ) -> dict[str, Tensor | dict[str, Pair]]:
        """Return `logits` `(B, L, V)` and the cache of all tokens."""
        cache = _cache([*past_key_values.values()])
        logits = self.called(past_key_values=cache, use_cache=True, **given).logits
        return {"logits": logits, "present": _layers(cache)}


class Encoder(_Calls):
    """The encoder of an encoder-decoder, up to the keys and values that its decoder reads."""

    def forward(self, **given: Tensor) -> dict[str, dict[str, dict[str, Pair]]]:
        """Return the keys and values of the cross-attentions."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # They do not depend on the decoder's tokens; what does, is left out of the graph.
        rows = next(iter(given.values())).shape[0]  # len() would make a constant of it
        tokens = torch.zeros(rows, 1, dtype=torch.long)
        self.called(**given, decoder_input_ids=tokens, past_key_values=cache, use_cache=True)
        crossed = _layers(cache.cross_attention_cache)
        return {"present": {at: {"encoder": layer} for at, layer in crossed.items()}}


class CrossDecoder(_Calls):
    """The decoder of an encoder-decoder, without the encoder."""

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Mapping[str, Mapping[str, Pair]],
        encoder_attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor | dict[str, dict[str, Pair]]]:
        """Return `logits` `(B, L, V)` and the decoder's own cache of all tokens."""
        given = [layer.get("encoder") for layer in past_key_values.values()]
        length = next(layer["key"].shape[2] for layer in given if layer)
        weights = next(self.called.parameters())
        rows = input_ids.shape[0]
        none = weights.new_zeros(rows, 1, 1, 1)
        cache = EncoderDecoderCache(
            _cache([layer["decoder"] for layer in past_key_values.values()]),
            _cache([layer or {"key": none, "value": none} for layer in given]),
        )
        cache.is_updated = dict.fromkeys(range(len(given)), True)
        # Its keys and values are given; all that is still read of the encoder's states is the size.
        states = weights.new_zeros(rows, length, self.config.hidden_size)
        outputs = self.called(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        own = _layers(cache.self_attention_cache)
        return {
            "logits": outputs.logits,
            "present": {at: {"decoder": layer} for at, layer in own.items()},
        }


def write_decoder(model: PreTrainedModel, path: Path, fuse_for: graph.Provider | None) -> None:
    """Write the graph of a causal language model."""
    cache, tokens = DynamicCache(), torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with torch.inference_mode():
        model(input_ids=tokens[:, :PAST], past_key_values=cache, use_cache=True)
    inputs = {"input_ids": tokens, "attention_mask": tokens.new_ones(ROWS, PAST + LENGTH)}
    axes: dict[str, Sequence[str]]
    axes = {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", TOTAL)}
    if takes_positions(model):
        inputs["position_ids"] = torch.arange(PAST, PAST + LENGTH).expand(ROWS, -1)
        axes["position_ids"] = axes["input_ids"]
    past = _layers(cache)
    axes |= _named("past_key_values", past, ("batch", "", "past_sequence"))
    graph.write(
        Decoder(model),
        inputs | {"past_key_values": past},
        axes=axes,
        path=path,
        fuse_for=fuse_for,
    )


def write_encoder_decoder(
    model: PreTrainedModel,
    given: Mapping[str, Tensor],
    given_axes: Axes,
    path: Path,
    fuse_for: graph.Provider | None,
) -> None:
    """Write both graphs.

    Args:
        model: an encoder-decoder.
        given: what the encoder takes, two rows at least.
        given_axes: their dynamic axes.
        path: the file to write the decoder to; the encoder lies beside it.
        fuse_for: see `graph.write`.

    Raises:
        ExportError: no head of any cross-attention is left.
    """
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    rows = len(next(iter(given.values())))
    tokens = torch.zeros(rows, LENGTH, dtype=torch.long)
    with torch.inference_mode():
        model(
            **given,
            decoder_input_ids=tokens[:, :PAST],
            past_key_values=cache,
            use_cache=True,
        )
    crossed = _layers(cache.cross_attention_cache)
    if not crossed:
        raise ExportError(
            f"{path.name}: found no cross-attention with heads, expected one; a decoder that reads"
            " nothing of its encoder makes no two graphs"
        )
    beside = encoder_file(path)
    graph.write(Encoder(model), given, axes=given_axes, path=beside, fuse_for=fuse_for)
    past = {
        at: {"decoder": own} | ({"encoder": crossed[at]} if at in crossed else {})
        for at, own in _layers(cache.self_attention_cache).items()
    }
    inputs: dict[str, Any] = {"input_ids": tokens, "past_key_values": past}
    axes: dict[str, Sequence[str]] = {"input_ids": ("batch", "sequence")}
    heard = "sequence" in next(iter(given_axes.values()))
    for at, layer in past.items():
        for side, length in (("decoder", "past_sequence"), ("encoder", "encoder_sequence" * heard)):
            pair = layer.get(side, {})
            axes |= _named(f"past_key_values.{at}.{side}", pair, ("batch", "", length))
    if "attention_mask" in given:
        inputs["encoder_attention_mask"] = given["attention_mask"]
        axes["encoder_attention_mask"] = ("batch", "encoder_sequence")
    graph.write(CrossDecoder(model), inputs, axes=axes, path=path, fuse_for=fuse_for)


def takes_positions(model: PreTrainedModel) -> bool:
    """Return whether the model can be told the positions of its tokens."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _cache(pairs: Sequence[Pair]) -> DynamicCache:
    return DynamicCache([(layer["key"], layer["value"]) for layer in pairs])


def _layers(cache: DynamicCache) -> dict[str, Pair]:
    """Return the keys and values that a cache holds, by the number of their layer."""
    found: dict[str, Pair] = {}
    for at, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)
        if layer.is_initialized:
            assert layer.keys is not None
            assert layer.values is not None
            found[str(at)] = {"key": layer.keys, "value": layer.values}
    return found


def _named(name: str, given: Any, axes: Sequence[str]) -> dict[str, Sequence[str]]:
    """Return the same axes for every tensor in nested dicts, by its whole name."""
    if not isinstance(given, Mapping):
        return {name: axes}
    found: dict[str, Sequence[str]] = {}
    for key, inner in given.items():
        found |= _named(f"{name}.{key}", inner, axes)
    return found
