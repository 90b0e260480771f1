"""Layers and sublayers that give nothing go first, and what is left is what was measured."""

import pytest
import torch
from tiny_models import inputs, tiny

from pipeline import depth, structure
from pipeline.distillation import divergence


def judged(model):
    return [inputs(model, length) for length in (8, 11)]


def outputs(model):
    with torch.no_grad():
        return model(**inputs(model)).logits


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_layer_that_adds_nothing_goes_first(family):
    model = tiny(family)
    groups = structure.groups(model)
    for group in groups:
        if group.layer == 1:
            structure.matrix(group.reader).data.zero_()
            if (bias := structure.bias(group.reader)) is not None:
                bias.data.zero_()
    before = outputs(model)
    gone = depth.drop_layers(model, 1 / 3, judged(model))
    (name,) = gone
    assert name.endswith(".1")
    assert gone[name] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(outputs(model), before)
    assert sum(1 for group in structure.groups(model) if group.kind == "neurons") == 2


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_the_divergence_that_is_told_is_that_of_the_cut_model(family):
    model = tiny(family)
    dense = tiny(family)
    batches = judged(model)
    gone = depth.drop_layers(model, 0.5, batches)
    found = divergence(model, dense, batches)
    assert found == pytest.approx(list(gone.values())[-1], rel=1e-3)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("repair", ["none", "least-squares"])
def test_sublayers_go_as_a_whole(family, repair):
    model = tiny(family)
    dense = tiny(family)
    batches = judged(model)
    gone = depth.drop_sublayers(
        model, 0.34, batches, repair=repair, data=lambda: iter(batches * 5), total=10
    )
    assert len(gone) == 2
    left = {group.path: group.kept for group in structure.groups(model)}
    assert all(not left[path] for path in gone)
    if repair == "none":
        found = divergence(model, dense, batches)
        assert found == pytest.approx(list(gone.values())[-1], rel=1e-3)


def test_every_stack_keeps_a_layer():
    model = tiny("t5")
    depth.drop_layers(model, 0.99, judged(model))
    assert [len(blocks) for _, blocks in structure.stacks(model)] == [1, 1]


def test_layers_that_all_have_to_stay_are_refused():
    for model in (tiny("albert"), tiny("gpt2", scale_attn_by_inverse_layer_idx=True)):
        with pytest.raises(ValueError, match="none can be cut out"):
            depth.drop_layers(model, 0.5, judged(model))
