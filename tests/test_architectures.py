"""Groups of units, and how what is left of them is written down."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SIZES, tiny
from torch import nn
from transformers import AlbertConfig, AlbertModel

from pipeline import prune_heads, structure, units
from pipeline.structure import decode, encode


@given(st.integers(1, 2000), st.data())
def test_kept_units_are_read_as_they_were_written(of, data):
    kept = tuple(sorted(data.draw(st.sets(st.integers(0, of - 1), min_size=1))))
    assert decode(encode(kept, of)) == kept


def test_few_units_are_listed_and_many_are_a_mask():
    assert encode((0, 3), 12) == [0, 3]
    assert encode((0, 1, 4), 1536) == "13"


def test_a_head_unit_of_grouped_attention_holds_its_queries():
    model = tiny("llama")  # eight query heads of size 4 over four key/value heads
    group = structure.groups(model)[0]
    assert (len(group.kept), group.width) == (4, 8)
    before = {n: p.shape for n, p in model.model.layers[0].self_attn.named_parameters()}
    prune_heads(model, {0: [2]})
    after = {n: p.shape for n, p in model.model.layers[0].self_attn.named_parameters()}
    assert before["q_proj.weight"][0] - after["q_proj.weight"][0] == 8
    assert before["k_proj.weight"][0] - after["k_proj.weight"][0] == 4
    assert before["o_proj.weight"][1] - after["o_proj.weight"][1] == 8


def test_a_backbone_alone_has_the_same_units():
    model = tiny("bert")
    with_head, alone = units(model).heads, units(model.bert).heads
    assert [*with_head] == [f"bert.{path}" for path in alone]


def test_several_layers_in_a_group_are_refused():
    config = AlbertConfig(**SIZES, embedding_size=16, inner_group_num=2)
    with pytest.raises(ValueError, match="found inner_group_num 2, expected 1"):
        units(AlbertModel(config))


class Adapter(nn.Module):
    def __init__(self, wrapped: nn.Linear) -> None:
        super().__init__()
        self.wrapped, self.weight, self.bias = wrapped, wrapped.weight, wrapped.bias


def test_a_wrapped_matrix_is_refused_before_anything_is_cut():
    model = tiny("bert")
    attention = model.bert.encoder.layer[0].attention.self
    attention.value = Adapter(attention.value)
    before = model.num_parameters()
    with pytest.raises(
        ValueError, match=r"attention\.self\.value: found a Adapter, .* merge adapters first"
    ):
        prune_heads(model, {0: [1]})
    assert model.num_parameters() == before


def test_quantized_weights_are_refused():
    model = tiny("bert")
    model.is_quantized = True
    with pytest.raises(ValueError, match="found quantized weights, expected floating point"):
        units(model)
