"""Parameters and bytes belong to the part that they are counted in by hand."""

import numpy as np
import onnx
import pytest
from tiny_models import tiny

from exporters import onnx as exporter
from pipeline import parts, prune_heads
from pipeline.quantization import Options, quantize


def by_hand(model) -> dict[str, int]:
    """Count a BERT's parameters; heads of 8, three layers of 32 with 48 neurons."""
    heads = [len(layer.attention.self.query.weight) // 8 for layer in model.bert.encoder.layer]
    attention = sum(3 * (32 + 1) * 8 * head + (8 * head + 1) * 32 + 64 for head in heads)
    return {
        "embeddings": 32 * (99 + 64 + 2),
        "attention": attention,
        "ffn": 3 * (33 * 48 + 49 * 32),
        "rest of the layers": 3 * 64,
        "head and rest": 64 + 33 * 32 + 33 * 2,
    }


def test_parameters_and_bytes_of_a_model():
    model = tiny("bert")
    prune_heads(model, {0: [1, 2]})
    expected = by_hand(model)
    assert parts.parameters(model, parts.places(model)) == expected
    assert parts.bytes_of_model(model) == {part: 4 * count for part, count in expected.items()}
    assert sum(expected.values()) == model.num_parameters()


def test_a_family_that_cannot_be_cut_has_embeddings_and_a_rest(monkeypatch):
    def refuse(_):
        raise ValueError("no")

    model = tiny("bert")
    monkeypatch.setattr(parts.structure, "groups", refuse)
    found = parts.parameters(model, parts.places(model))
    assert found["embeddings"] == by_hand(model)["embeddings"]
    assert found["head and rest"] == model.num_parameters() - found["embeddings"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    found = {}
    for fuse_for in (None, "cpu"):
        model, path = tiny("bert"), tmp_path_factory.mktemp("graph") / "model.onnx"
        ids = np.random.default_rng(0).integers(3, 99, (2, 11))
        samples = [{"input_ids": ids, "attention_mask": np.ones_like(ids)}] * 2
        exporter.export(model, samples, axes=("batch", "sequence"), path=path, fuse_for=fuse_for)
        found[fuse_for] = model, path
    return found


@pytest.mark.parametrize("fuse_for", [None, "cpu"])
def test_bytes_of_a_graph(exported, fuse_for):
    model, path = exported[fuse_for]
    found, expected = parts.bytes_of_graph(path, model), by_hand(model)
    for part in ("embeddings", "attention", "ffn"):
        assert found[part] == pytest.approx(4 * expected[part], rel=0.06)
    whole = sum(x.ByteSize() for x in onnx.load(path).graph.initializer)
    assert sum(found.values()) == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("method", ["int8-dynamic", "int4-weights", "fp16"])
def test_bytes_of_a_quantized_graph(exported, tmp_path, method):
    model, path = exported[None if method == "fp16" else "cpu"]
    quantize(path, tmp_path / "q.onnx", method, Options(block_size=16))
    before = parts.bytes_of_graph(path, model)
    after = parts.bytes_of_graph(tmp_path / "q.onnx", model)
    # Scales and zero points of columns of 32 to 48 weights, and of blocks of 16; biases stay.
    share = {"int8-dynamic": 0.31, "int4-weights": 0.125 + 1 / 16, "fp16": 0.5}[method]
    for part in ("attention", "ffn"):
        assert after[part] == pytest.approx(share * before[part], rel=0.3)
    kept = 0.5 if method == "fp16" else 1.0
    assert after["embeddings"] == pytest.approx(kept * before["embeddings"], rel=0.05)
