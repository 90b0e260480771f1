"""What is cut alike everywhere loads in the stock class, or is refused with the reason."""

import json

import pytest
import torch
from conftest import FAMILIES, inputs, secateur, tiny
from transformers import PreTrainedConfig

from pipeline import (
    from_pretrained,
    native,
    prune_heads,
    prune_neurons,
    prune_queries,
    save_pretrained,
    structure,
    units,
)
from pipeline.checkpoint import without_weights

HEADS = ["gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"]
HEADS += ["smollm3", "phi", "vit", "deit"]
FIXED = ["bloom"]
"""The width of its FFN is four times the model's, whatever the configuration says."""


def logits(model):
    with torch.no_grad():
        return model(**inputs(model)).logits


def check(model, folder):
    native.configure(model)
    save_pretrained(model, folder)
    stock = type(model).from_pretrained(folder).eval()
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(from_pretrained(folder)), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FIXED])
def test_as_many_neurons_in_every_layer(name, tmp_path):
    model = tiny(name)
    prune_neurons(model, {path: range(8) for path in units(model).neurons})
    check(model, tmp_path)


@pytest.mark.parametrize("name", HEADS)
def test_as_many_heads_in_every_layer(name, tmp_path):
    model = tiny(name)
    prune_heads(model, {path: [at % 4, (at + 1) % 4] for at, path in enumerate(units(model).heads)})
    check(model, tmp_path)


def test_as_many_query_heads_of_every_head(tmp_path):
    model = tiny("llama")
    prune_queries(model, {path: [0, 3, 4, 7] for path in units(model).queries})
    check(model, tmp_path)
    assert model.config.num_attention_heads == 4
    assert units(model).queries == {}


def test_a_rehearsal_goes_as_far_as_the_cut_will(tmp_path):
    save_pretrained(tiny("llama"), tmp_path)
    native.rehearse(without_weights(tmp_path), {"heads": 0.5, "neurons": 0.3}, 8)
    with pytest.raises(ValueError, match=r"hidden size \(32\) is not a multiple of"):
        native.rehearse(without_weights(tmp_path), {"heads": 0.25}, 1)


@pytest.mark.parametrize(
    ("name", "cuts", "message"),
    [
        ("llama", {0: [1]}, "found 8 left, expected 6 as elsewhere"),
        ("llama", {0: [0], 1: [0], 2: [0]}, r"hidden size \(32\) is not a multiple of"),
        ("bert", {0: [1], 1: [1], 2: [2]}, "the configuration of bert cannot say what was cut"),
        ("bloom", {0: [1], 1: [1], 2: [2]}, "found heads that depend on their number"),
    ],
)
def test_what_cannot_be_said_is_refused(name, cuts, message):
    model = tiny(name)
    prune_heads(model, cuts)
    before = model.config.pruning
    with pytest.raises(ValueError, match=message):
        native.configure(model)
    assert model.config.pruning == before


def test_a_width_that_no_configuration_names_is_refused():
    model = tiny("bloom")
    prune_neurons(model, {layer: [0] for layer in range(3)})
    with pytest.raises(ValueError, match="the configuration of bloom cannot say what was cut"):
        native.configure(model)


@pytest.mark.parametrize("name", ["llama", "qwen2", "vit", "phi3"])
def test_the_schema_for_other_software_says_what_every_layer_has(name):
    model = tiny(name)
    prune_heads(model, {0: [0], 1: [1, 2]})
    prune_neurons(model, {1: range(8)} | ({2: range(48)} if name == "llama" else {}))
    written = native.per_layer_config(model)
    assert "pruning" not in written
    read = PreTrainedConfig(**written)
    stack = structure.stacks(model)[0][0]
    assert read.is_heterogeneous
    left, layers = units(model), read.per_layer_config
    for at, (heads, neurons) in enumerate(
        zip(left.heads.values(), left.neurons.values(), strict=True)
    ):
        each = 2 if stack.groups and name != "vit" else 1
        assert getattr(layers[at], stack.heads) == heads * each
        if each == 2:
            assert layers[at].num_key_value_heads == heads
        if neurons:
            assert getattr(layers[at], stack.neurons) == neurons
    assert layers[0].skip == []
    assert layers[2].skip == (["mlp"] if name == "llama" else [])


@pytest.mark.parametrize(
    ("name", "heads", "reason"),
    [
        ("t5", [0], "two stacks of layers"),
        ("albert", [0], "layers that share their weights"),
        ("bloom", [0], "heads that depend on their number"),
        ("gpt2", [0, 1, 2, 3], "nothing left but a bias"),
    ],
)
def test_what_the_schema_cannot_say_is_refused(name, heads, reason):
    model = tiny(name)
    prune_heads(model, {next(iter(units(model).heads)): heads})
    with pytest.raises(ValueError, match=f"found {reason}, expected"):
        native.per_layer_config(model)


def test_a_number_that_the_configuration_lacks_is_refused():
    model = tiny("bloom")
    prune_neurons(model, {0: [0]})
    with pytest.raises(ValueError, match="found no number of neurons in the configuration"):
        native.per_layer_config(model)


def test_the_command_writes_the_schema_or_nothing(tmp_path):
    for name in ("llama", "bloom"):
        model = tiny(name)
        prune_heads(model, {1: [0, 1]})
        save_pretrained(model, tmp_path / name)
    written = tmp_path / "config.json"
    assert secateur("inspect", tmp_path / "llama", "--per-layer-config", written).returncode == 0
    layer = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert json.loads(written.read_text())["per_layer_config"] == {"1": layer}
    refused = tmp_path / "refused.json"
    done = secateur("inspect", tmp_path / "bloom", "--per-layer-config", refused)
    assert done.returncode == 2
    assert "--per-layer-config: transformer.h.1.self_attention: found heads" in done.stderr
    assert not refused.exists()
