"""Exports give torch's outputs, also at shapes that were not traced."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_models import tiny

import exporters
from exporters import ExportError, MissingDependency, NotHere
from exporters import onnx as exporter
from exporters.onnx import graph, session
from pipeline import prune_heads, prune_neurons, units

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


def test_a_pruned_model_is_the_same_in_onnx_runtime(exported):
    model, (path, difference) = pruned("bert"), exported("bert")
    assert difference < 1e-5
    graph = onnx.load(path).graph
    names = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert names == {"input_ids": [*AXES], "attention_mask": [*AXES]}
    predict = exporter.predictor(path, device="cpu", threads=1)
    other = inputs(5, 29)
    with torch.inference_mode():
        expected = model(**{k: torch.from_numpy(v) for k, v in other.items()}).logits.numpy()
    np.testing.assert_allclose(predict(other)["logits"], expected, atol=1e-4, rtol=1e-4)


def axes_of(values) -> dict[str, list[object]]:
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in values
    }


def test_a_decoder_takes_and_gives_a_cache(exported):
    graph = onnx.load(exported("gpt2")[0]).graph
    total = "past_sequence + sequence"
    named = axes_of(graph.input)
    assert named["input_ids"] == named["position_ids"] == [*AXES]
    assert named["attention_mask"] == ["batch", total]
    assert named["past_key_values.1.value"] == ["batch", 2, "past_sequence", 8]
    assert axes_of(graph.output)["present.1.value"] == ["batch", 2, total, 8]


def test_a_decoder_that_reads_nothing_of_its_encoder_is_refused(tmp_path):
    model, path = tiny("t5"), tmp_path / "model.onnx"
    crossed = [path for path in units(model).heads if "EncDecAttention" in path]
    prune_heads(model, {path: range(4) for path in crossed})
    sample = inputs(2, 11)
    sample["decoder_input_ids"] = sample["input_ids"][:, :7]
    with pytest.raises(ExportError, match="found no cross-attention with heads, expected one"):
        exporter.export(model, [sample], axes=AXES, path=path, fuse_for="cpu")


def test_a_smaller_model_is_a_smaller_file(tmp_path, exported):
    write(tiny("bert"), tmp_path / "dense.onnx")
    saved = (tmp_path / "dense.onnx").stat().st_size - exported("bert")[0].stat().st_size
    removed = tiny("bert").num_parameters() - pruned("bert").num_parameters()
    assert saved == pytest.approx(4 * removed, rel=0.05)


def test_a_graph_tells_nothing_of_the_machine_that_wrote_it(exported):
    path, _ = exported("bert")
    assert b"stack_trace" not in path.read_bytes()
    assert str(Path(__file__).parents[1]).encode() not in path.read_bytes()


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "EXTERNAL_BYTES", 1000)
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
    with pytest.raises(NotHere, match=r"found .*, expected CUDAExecution"):
        exporter.predictor(path, device="cuda", threads=1)


@pytest.mark.parametrize("found", [None, object()])
def test_a_missing_runtime_names_both_extras(monkeypatch, found):
    monkeypatch.setattr(session, "_ORT", found)
    with pytest.raises(MissingDependency, match=r"\.\[cpu\].*\.\[gpu\]"):
        exporter.runtime()


def test_the_formats_are_the_modules():
    assert exporters.formats() == ["onnx", "tensorrt"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_products_are_named_after_their_modules(family, exported):
    constants = {
        x.name for x in onnx.load(exported(family)[0]).graph.initializer if len(x.dims) == 2
    }
    named = [
        node.name
        for node in onnx.load(exported(family)[0]).graph.node
        if node.op_type in {"MatMul", "Gemm"} and node.input[1] in constants
    ]
    modules = dict(pruned(family).named_modules())
    assert set(named) <= set(modules)
    assert len(set(named)) == len(named) >= 3 * 4
