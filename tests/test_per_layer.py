"""The schema says what every layer has, or what it cannot say is refused."""

import json

import pytest
from conftest import secateur
from tiny_models import SIZES, tiny
from transformers import BertConfig, BertLMHeadModel, PreTrainedConfig

from pipeline import (
    per_layer,
    prune_heads,
    prune_layers,
    prune_neurons,
    save_pretrained,
    structure,
    units,
)


@pytest.mark.parametrize("name", ["llama", "qwen2", "vit", "phi3"])
def test_the_schema_for_other_software_says_what_every_layer_has(name):
    model = tiny(name)
    prune_heads(model, {0: [0], 1: [1, 2]})
    prune_neurons(model, {1: range(8)} | ({2: range(48)} if name == "llama" else {}))
    written = per_layer.per_layer_config(model)
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
        per_layer.per_layer_config(model)


def test_entries_are_numbered_as_the_layers_that_are_left():
    model = tiny("llama")
    prune_heads(model, {2: [0, 1]})
    prune_layers(model, [0])
    written = per_layer.per_layer_config(model)
    assert written["num_hidden_layers"] == 2
    assert written["per_layer_config"] == {
        "1": {"num_attention_heads": 4, "num_key_value_heads": 2}
    }


def test_two_attentions_in_a_layer_are_refused():
    config = BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    model = BertLMHeadModel(config)
    prune_heads(model, {"bert.encoder.layer.0.attention": [0]})
    with pytest.raises(ValueError, match="crossattention: found a second attention in a layer"):
        per_layer.per_layer_config(model)


def test_a_number_that_the_configuration_lacks_is_refused():
    model = tiny("bloom")
    prune_neurons(model, {0: [0]})
    with pytest.raises(ValueError, match="found no number of neurons in the configuration"):
        per_layer.per_layer_config(model)


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
