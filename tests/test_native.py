"""What is cut alike everywhere loads in the stock class, or is refused with the reason."""

import pytest
import torch
from tiny_models import FAMILIES, SHARED, grouped, inputs, tiny

from pipeline import (
    from_pretrained,
    native,
    prune_heads,
    prune_neurons,
    prune_queries,
    save_pretrained,
    units,
)
from pipeline.checkpoint import without_weights

HEADS = [*SHARED, "vit", "deit"]
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


@pytest.mark.parametrize("name", SHARED)
def test_as_many_query_heads_of_every_head(name, tmp_path):
    model = grouped(name)
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
