"""Exports give torch's outputs, also at shapes that were not traced."""

import numpy as np
import onnx
import pytest
import torch
from conftest import tiny

import exporters
from exporters import ExportError, MissingDependency
from exporters import onnx as exporter
from pipeline import prune_heads, prune_neurons
from pipeline.quantization import INTEGER_OPERATORS, METHODS, QuantizationError

AXES = ("batch", "sequence")


def inputs(batch: int, sequence: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch + sequence)
    ids = generator.integers(3, 99, (batch, sequence))
    mask = np.ones_like(ids)
    mask[-1, sequence - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pruned(family: str):
    model = tiny(family)
    prune_heads(model, {0: [1], 1: [0, 2]})
    prune_neurons(model, {1: [*range(20)]})
    return model


def write(model, path):
    samples = [inputs(2, 11), inputs(3, 17), inputs(1, 5)]
    return exporter.export(model, samples, axes=AXES, path=path, fuse_for="cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Give a function from a family to its pruned model's graph, made once."""
    made = {}

    def get(family: str):
        if family not in made:
            path = tmp_path_factory.mktemp(family) / "model.onnx"
            made[family] = path, write(pruned(family), path)
        return made[family]

    return get


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_pruned_model_is_the_same_in_onnx_runtime(family, exported):
    model, (path, difference) = pruned(family), exported(family)
    assert difference < 1e-5
    graph = onnx.load(path).graph
    names = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert names == {"input_ids": [*AXES], "attention_mask": [*AXES]}
    predict = exporter.predictor(path, device="cpu", threads=1)
    other = inputs(5, 29)
    with torch.inference_mode():
        expected = model(**{k: torch.from_numpy(v) for k, v in other.items()}).logits.numpy()
    np.testing.assert_allclose(predict(other)["logits"], expected, atol=1e-4, rtol=1e-4)


def test_a_smaller_model_is_a_smaller_file(tmp_path, exported):
    write(tiny("bert"), tmp_path / "dense.onnx")
    saved = (tmp_path / "dense.onnx").stat().st_size - exported("bert")[0].stat().st_size
    removed = tiny("bert").num_parameters() - pruned("bert").num_parameters()
    assert saved == pytest.approx(4 * removed, rel=0.05)


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "EXTERNAL_BYTES", 1000)
    path = tmp_path / "model.onnx"
    assert write(tiny("bert"), path) < 1e-5
    assert (tmp_path / "model.onnx_data").stat().st_size > 50_000
    assert exporter.predictor(path, device="cpu", threads=1)(inputs(2, 5))["logits"].shape == (2, 2)


def test_an_export_with_other_outputs_is_an_error(exported):
    path, _ = exported("bert")
    with pytest.raises(ExportError, match="output 'logits' differs from torch by"):
        exporter.verify(tiny("bert", seed=1), [inputs(2, 5)], path)


@pytest.mark.parametrize("content", [b"", b"not a graph"])
def test_a_file_that_is_no_graph_is_an_error(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.onnx: ONNX Runtime cannot open it"):
        exporter.predictor(path, device="cpu", threads=1)


def test_a_provider_that_is_not_here_is_an_error(exported):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    path, _ = exported("bert")
    with pytest.raises(RuntimeError, match=r"found .*, expected CUDAExecution"):
        exporter.predictor(path, device="cuda", threads=1)


@pytest.mark.parametrize("found", [None, object()])
def test_a_missing_runtime_names_both_extras(monkeypatch, found):
    monkeypatch.setattr(exporter, "_ORT", found)
    with pytest.raises(MissingDependency, match=r"\.\[cpu\].*\.\[gpu\]"):
        exporter.runtime()


def test_the_formats_are_the_modules():
    assert exporters.formats() == ["onnx"]


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_quantized_weights_are_small_and_near(tmp_path, exported, family, method, embeddings):
    source, target = exported(family)[0], tmp_path / "quantized.onnx"
    count = METHODS[method](source, target, embeddings=embeddings, reduce_range=False)
    graph = onnx.load(target).graph
    assert count == sum(node.op_type in INTEGER_OPERATORS for node in graph.node)
    # Query, key and value may be one product; output and two of the FFN are not.
    assert count >= 3 * 4
    assert target.stat().st_size < source.stat().st_size
    exact, near = (
        exporter.predictor(path, device="cpu", threads=1)(inputs(4, 9))["logits"]
        for path in (source, target)
    )
    assert np.corrcoef(exact.ravel(), near.ravel())[0, 1] > 0.95


def test_embeddings_shrink_only_when_asked(tmp_path, exported):
    source, _ = exported("bert")
    sizes = []
    for embeddings in (False, True):
        METHODS["int8-dynamic"](
            source, tmp_path / "q.onnx", embeddings=embeddings, reduce_range=False
        )
        sizes.append((tmp_path / "q.onnx").stat().st_size)
    table = 32 * (99 + 64 + 2)  # words, positions and types; one byte for four
    assert sizes[0] - sizes[1] == pytest.approx(3 * table, rel=0.1)


def test_nothing_to_quantize_is_an_error(tmp_path):
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ports = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", ports[:1], ports[1:])
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "m.onnx"
    )
    with pytest.raises(QuantizationError, match="found no matrix product"):
        METHODS["int8-dynamic"](
            tmp_path / "m.onnx", tmp_path / "q.onnx", embeddings=False, reduce_range=False
        )
