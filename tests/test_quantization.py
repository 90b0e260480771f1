"""Graphs in fewer bits: small, near the graph they come from, and never the same in silence."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from conftest import multiplying, write_recipe
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from tiny_models import tiny

from benchmarks.data import DataError
from benchmarks.machine import describe
from exporters import onnx as exporter
from exporters.onnx import graph as graphs
from exporters.onnx.graph import store
from pipeline import migration, prune_heads, prune_neurons, quantization, units
from pipeline.quantization import (
    METHODS,
    Options,
    QuantizationError,
    layers,
    quantize,
    quantize_all,
)
from pipeline.recipe import Recipe, RecipeError
from pipeline.runner import run

CASES = {
    "fp16": ("fp16", {}),
    "int8-dynamic": ("int8-dynamic", {}),
    "int8-dynamic migrated": ("int8-dynamic", {"migration": 0.5}),
    "int8-static": ("int8-static", {}),
    "int8-static migrated": ("int8-static", {"migration": 0.5}),
    "int8-static portable": ("int8-static", {"portable": True}),
    "int8-weights": ("int8-weights", {}),
    "int8-weights portable": ("int8-weights", {"portable": True}),
    "int4-weights": ("int4-weights", {"block_size": 16}),
    "int4-weights asymmetric": ("int4-weights", {"block_size": 16, "symmetric": False}),
    "int4-weights portable": ("int4-weights", {"block_size": 16, "portable": True}),
    "int4-weights k-quant": ("int4-weights", {"block_size": 16, "algorithm": "k-quant"}),
    "int4-weights hqq": ("int4-weights", {"block_size": 16, "algorithm": "hqq"}),
    "int4-weights gptq": ("int4-weights", {"block_size": 16, "algorithm": "gptq"}),
}
STANDARD = {"", "ai.onnx"}


def inputs(batch: int, sequence: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch + sequence)
    ids = generator.integers(3, 99, (batch, sequence))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def calibration():
    return iter([inputs(8, length) for length in range(5, 15)])


def logits(path, given=None) -> np.ndarray:
    given = given or inputs(8, 13)
    return exporter.predictor(path, device="cpu", threads=1)(given)["logits"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Give a function that returns a pruned family's graph, fused or of standard operators."""
    made = {}

    def get(family: str, *, standard: bool = False):
        if (family, standard) not in made:
            model = tiny(family)
            prune_heads(model, {0: [1], 1: [0, 2]})
            prune_neurons(model, {1: [*range(20)]})
            path = tmp_path_factory.mktemp(family) / "model.onnx"
            fuse_for = None if standard else "cpu"
            samples = [inputs(2, 11), inputs(3, 17)]
            exporter.export(
                model, samples, axes=("batch", "sequence"), path=path, fuse_for=fuse_for
            )
            made[family, standard] = path
        return made[family, standard]

    return get


def weight_bytes(path) -> int:
    return sum(initializer.ByteSize() for initializer in onnx.load(path).graph.initializer)


@pytest.mark.parametrize(
    ("family", "case"),
    [*product(["bert", "llama"], CASES), *product(["gpt2"], ["int8-static", "int4-weights"])],
)
def test_weights_are_small_and_outputs_near(tmp_path, exported, family, case):
    method, given = CASES[case]
    options = Options(
        embeddings="embeddings" in METHODS[method].options,
        reduce_range=describe().saturates,
        calibration=calibration,
        **given,
    )
    standard = options.portable or METHODS[method].whole
    source, target = exported(family, standard=standard), tmp_path / "quantized.onnx"
    count = quantize(source, target, method, options)
    # Query, key and value may be one product; output and two of the FFN are not.
    assert count >= 3 * 4
    most = {"fp16": 0.55, "int8": 0.45, "int4": 0.35}[method[:4]]  # scales and biases are in it
    assert weight_bytes(target) < most * weight_bytes(source)
    exact, near = logits(source), logits(target)
    assert not np.array_equal(exact, near)
    # Sharp random weights suffer more than trained ones do.
    least = {"fp16": 0.9999, "int8": 0.85, "int4": 0.6}[method[:4]]
    assert np.corrcoef(exact.ravel(), near.ravel())[0, 1] > least
    if options.portable:
        assert {node.domain for node in onnx.load(target).graph.node} <= STANDARD


def pairs(batch: int, sequence: int) -> dict[str, np.ndarray]:
    return inputs(batch, sequence) | {"decoder_input_ids": inputs(batch, sequence - 3)["input_ids"]}


@pytest.fixture(scope="module")
def two_graphs(tmp_path_factory):
    """Give the folder of a pruned encoder-decoder's export, of standard operators."""
    folder, model = tmp_path_factory.mktemp("t5"), tiny("t5")
    prune_heads(model, {"encoder.block.0.layer.0.SelfAttention": [1]})
    prune_neurons(model, {[*units(model).neurons][-1]: [*range(20)]})
    path = folder / exporter.MODEL
    path.parent.mkdir()
    samples = [pairs(2, 11), pairs(3, 17)]
    exporter.export(model, samples, axes=("batch", "sequence"), path=path, fuse_for=None)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_both_graphs_of_an_encoder_decoder_shrink(tmp_path, two_graphs, case):
    method, given = CASES[case]
    options = Options(
        embeddings="embeddings" in METHODS[method].options,
        reduce_range=describe().saturates,
        calibration=lambda: iter([pairs(8, length) for length in range(5, 15)]),
        **given,
    )
    source, target = two_graphs / exporter.MODEL, tmp_path / exporter.MODEL
    target.parent.mkdir()
    count = quantize_all(source, target, method, options)
    # Of each block: six of the encoder, whose file has the keys and values of the decoder's cross-
    # attention too, and eight of the decoder.
    assert count >= 2 * 6 + 2 * 2 + 2 * 8
    most = {"fp16": 0.55, "int8": 0.45, "int4": 0.35}[method[:4]]
    for before, after in zip(exporter.files(source), exporter.files(target), strict=True):
        assert weight_bytes(after) < most * weight_bytes(before)
    exact, near = (
        exporter.open_predictor(folder, device="cpu", threads=1)(pairs(8, 13))["logits"]
        for folder in (two_graphs, tmp_path)
    )
    assert not np.array_equal(exact, near)
    least = {"fp16": 0.999, "int8": 0.8, "int4": 0.5}[method[:4]]
    assert np.corrcoef(exact.ravel(), near.ravel())[0, 1] > least


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].whole])
def test_embeddings_shrink_only_when_asked(tmp_path, exported, method):
    sizes = []
    for embeddings in (False, True):
        options = Options(embeddings=embeddings, calibration=calibration)
        quantize(exported("bert"), tmp_path / "q.onnx", method, options)
        sizes.append(weight_bytes(tmp_path / "q.onnx"))
    table = 32 * (99 + 64 + 2)  # words, positions and types, with four bytes each before
    saved = {"int4-weights": 3.375, "int8-weights": 2.875}.get(method, 3)
    assert sizes[0] - sizes[1] == pytest.approx(saved * table, rel=0.15)


@pytest.mark.parametrize("standard", [False, True])
def test_a_head_tied_to_the_embeddings_goes_with_them(tmp_path, standard):
    path, target = tmp_path / "tied.onnx", tmp_path / "q.onnx"
    model = tiny("llama", tie_word_embeddings=True, vocab_size=600)
    samples, fuse_for = [inputs(2, 11), inputs(3, 17)], None if standard else "cpu"
    exporter.export(model, samples, axes=("batch", "sequence"), path=path, fuse_for=fuse_for)
    table, dense = 600 * 32 * 4, weight_bytes(path)
    counts, sizes = [], []
    for embeddings in (False, True):
        options = Options(embeddings=embeddings, portable=standard)
        counts.append(quantize(path, target, "int8-weights", options))
        sizes.append(weight_bytes(target))
        exact, near = logits(path), logits(target)
        assert np.corrcoef(exact.ravel(), near.ravel())[0, 1] > 0.95
    # It is there once, whole, or twice with a quarter of its size.
    assert counts[1] - counts[0] >= 1
    assert sizes[0] > table + 0.2 * (dense - table)
    assert sizes[1] < 0.4 * (dense - table) + 0.65 * table


def test_what_is_left_out_stays_as_it_is(tmp_path, exported):
    source, target = exported("bert"), tmp_path / "q.onnx"
    found = layers(source, "fp16", Options())
    assert list(found)[3:6] == [f"bert.encoder.layer.{at}" for at in range(3)]
    left = frozenset(found["bert.encoder.layer.1"])
    for method in METHODS:
        if METHODS[method].whole:
            continue
        whole = quantize(source, target, method, Options(calibration=calibration))
        part = quantize(source, target, method, Options(calibration=calibration, left=left))
        assert whole - part == len(left) == 4
        assert left <= {node.name for node in onnx.load(target).graph.node}


class GatherElements(OpRun):
    """Of the standard; that of onnx 1.23's evaluator cannot take several columns."""

    op_domain = ""

    def _run(self, data, indices, axis=0):
        return (np.take_along_axis(data, indices, axis=axis),)


def test_bf16_is_bf16_but_for_norms_and_softmax(tmp_path, exported):
    """ONNX Runtime has no bf16 products on the CPU; onnx's own evaluator has."""
    source, target = exported("bert", standard=True), tmp_path / "bf16.onnx"
    assert quantize(source, target, "bf16", Options()) == 3 * 6 + 3 + 2
    onnx.checker.check_model(str(target), full_check=True)
    graph = onnx.load(target)
    exact, near = (
        ReferenceEvaluator(onnx.load(path), new_ops=[GatherElements]).run(["logits"], inputs(8, 13))
        for path in (source, target)
    )
    assert near[0].dtype == np.float32
    assert np.corrcoef(exact[0].ravel(), near[0].ravel())[0, 1] > 0.999
    assert not np.array_equal(exact[0], near[0])

    types = {i.name: i.data_type for i in graph.graph.initializer}
    before = {i.name: numpy_helper.to_array(i) for i in onnx.load(source).graph.initializer}
    for info in onnx.shape_inference.infer_shapes(graph).graph.value_info:
        types[info.name] = info.type.tensor_type.elem_type
    for node in graph.graph.node:
        if node.op_type in {"MatMul", "Gemm"}:
            assert {types[name] for name in node.input} == {TensorProto.BFLOAT16}
        if node.op_type in {"LayerNormalization", "Softmax"}:
            assert {types[name] for name in node.input} == {TensorProto.FLOAT}
    assert TensorProto.FLOAT16 not in types.values()
    # Rounded from fp32 once: eight bits of it are left, in relation to each weight.
    for initializer in graph.graph.initializer:
        if initializer.data_type == TensorProto.BFLOAT16:
            rounded = numpy_helper.to_array(initializer).astype(np.float32)
            np.testing.assert_allclose(rounded, before[initializer.name], rtol=2**-8)


def test_what_is_beyond_fp16_is_kept_by_bf16(tmp_path):
    weight = np.array([[1e-30, 1e6], [3.4e38, -np.inf]], np.float32)
    path, target = tmp_path / "wide.onnx", tmp_path / "q.onnx"
    store(multiplying(weight), path)
    quantize(path, target, "bf16", Options())
    (kept,) = onnx.load(target).graph.initializer
    largest = 2.0**127 * (2 - 2**-7)  # of bf16: 3.39e38
    expected = np.array([[1e-30, 1e6], [largest, -largest]])
    np.testing.assert_allclose(numpy_helper.to_array(kept).astype(float), expected, rtol=2**-8)


def test_norms_of_large_states_stay_in_fp32(tmp_path):
    model = tiny("llama")
    model.model.embed_tokens.weight.data *= 3000  # their squares are beyond fp16
    samples = [inputs(2, 11), inputs(3, 17)]
    path, target = tmp_path / "large.onnx", tmp_path / "q.onnx"
    exporter.export(model, samples, axes=("batch", "sequence"), path=path, fuse_for=None)
    quantize(path, target, "fp16", Options())
    exact, near = logits(path), logits(target)
    assert np.corrcoef(exact.ravel(), near.ravel())[0, 1] > 0.999


def test_embeddings_alone_are_counted_too(tmp_path, exported):
    source, target = exported("bert"), tmp_path / "q.onnx"
    for method in METHODS:
        if METHODS[method].whole:
            continue
        options = Options(embeddings=True, calibration=calibration)
        found = layers(source, method, options)
        tables = [name for name in found if "embeddings" in name]
        assert len(tables) == 3
        left = frozenset(n for name in found if name not in tables for n in found[name])
        options = Options(embeddings=True, calibration=calibration, left=left)
        assert quantize(source, target, method, options) == 3
        assert not np.array_equal(logits(source), logits(target))
        assert not set(tables) & set(layers(source, method, Options()))


def test_matrices_that_layers_share_are_not_scaled_by_each(tmp_path):
    path, target = tmp_path / "shared.onnx", tmp_path / "m.onnx"
    samples = [inputs(2, 11), inputs(3, 17)]
    exporter.export(tiny("albert"), samples, axes=("batch", "sequence"), path=path, fuse_for="cpu")
    graph = onnx.load(path)
    migration.migrate(graph, 0.5, calibration)
    store(graph, target)
    np.testing.assert_allclose(logits(target), logits(path), atol=1e-4, rtol=1e-4)


def test_migration_changes_no_output(tmp_path, exported):
    graph = onnx.load(exported("bert"))
    assert migration.migrate(graph, 0.5, calibration) == 3 * 4
    store(graph, tmp_path / "m.onnx")
    exact = logits(exported("bert"))
    np.testing.assert_allclose(logits(tmp_path / "m.onnx"), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["int8-dynamic", "int8-static", "int8-weights"])
def test_large_weights_lie_beside_the_graph_under_the_name_that_servers_know(
    tmp_path, exported, monkeypatch, method
):
    options = quantization.Options(calibration=calibration)
    quantization.quantize(exported("bert"), tmp_path / "whole.onnx", method, options)
    for module in (quantization, graphs):
        monkeypatch.setattr(module, "EXTERNAL_BYTES", 1000)
    (tmp_path / "large").mkdir()
    quantization.quantize(exported("bert"), tmp_path / "large" / "model.onnx", method, options)
    files = {path.name: path.stat().st_size for path in (tmp_path / "large").iterdir()}
    assert files.keys() == {"model.onnx", "model.onnx_data"}
    assert files["model.onnx_data"] > 1000
    np.testing.assert_array_equal(
        logits(tmp_path / "large" / "model.onnx"), logits(tmp_path / "whole.onnx")
    )


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_scale_of_a_channel_is_that_of_the_paper(tmp_path, strength):
    x = np.array([[1.0, -8.0], [2.0, 4.0]], np.float32)
    weight = np.array([[0.5, -2.0], [0.25, 0.125]], np.float32)
    graph = multiplying(weight)
    migration.migrate(graph, strength, lambda: iter([{"x": x[:1]}, {"x": x[1:]}]))
    divisor = next(i for i in graph.graph.initializer if i.name == "x.divisor")
    expected = np.array([2.0, 8.0]) ** strength / np.array([2.0, 0.25]) ** (1 - strength)
    np.testing.assert_allclose(1 / numpy_helper.to_array(divisor), expected, rtol=1e-6)


def recipe(folder, calibration="train[700:800]", **quantize):
    splits = {"train": "train[:700]", "selection": "train[800:1000]", "gate": "train[1000:]"}
    path = write_recipe(
        folder,
        baseline="original",
        steps=[{"step": "quantize", **quantize}],
        budget={"max_drop": 0.9, "baseline_floor": -1.0},
    )
    content = yaml.safe_load(path.read_text())
    content["task"]["splits"] = splits | {"calibration": calibration}
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_recipe_leaves_out_what_loses_too_much(tmp_path):
    path = recipe(tmp_path, method="int4-weights", block_size=16, max_drop=1e-9)
    stages = json.loads(run(path, tmp_path / "out").to_json())["stages"]
    details = stages[-1]["details"]
    folders = [Path(stage["folder"], "onnx", "model.onnx") for stage in stages]
    kept = {x.name for x in onnx.load(folders[-1]).graph.node if x.op_type in {"MatMul", "Gemm"}}
    source = next(folders[0].parents[2].glob("onnx-*")) / "onnx" / "model.onnx"
    found = layers(source, "int4-weights", Options())
    # All layers were tried alone, and those that were left are whole in the file.
    assert details["divergences"].keys() == found.keys()
    worst_first = sorted(found, key=lambda name: -details["divergences"][name])
    assert details["left"] == worst_first[: len(details["left"])]
    assert details["left"]
    products = {n for name in details["left"] for n in found[name] if "embeddings" not in n}
    assert products <= kept


def test_too_few_examples_to_calibrate_on_are_refused(tmp_path):
    path = recipe(tmp_path, calibration="train[700:710]", method="int8-static")
    with pytest.raises(DataError, match="calibration: found 10 windows, expected at least 32"):
        run(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "fp16", "embeddings": True}, r"found \['embeddings'\] with fp16"),
        ({"method": "int8-dynamic", "algorithm": "hqq"}, r"found \['algorithm'\] with int8-dyn"),
        ({"method": "int4-weights", "algorithm": "hqq", "symmetric": True}, "has zero points"),
        ({"method": "int4-weights", "algorithm": "gptq", "portable": True}, "expected rtn"),
        ({"method": "int8-weights", "portable": True, "block_size": 16}, "scale for each column"),
        ({"method": "int4-weights", "block_size": 20}, "block_size: Input should be 16, 32"),
        ({"method": "int4-weights", "algorithm": "gtpq"}, "did you mean 'gptq'"),
    ],
)
def test_keys_that_do_nothing_or_contradict_are_refused(tmp_path, keys, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(recipe(tmp_path, **keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "int8-static"},
        {"migration": 0.5},
        {"method": "int4-weights", "algorithm": "gptq"},
    ],
)
def test_what_needs_data_asks_for_a_split(tmp_path, keys):
    path = recipe(tmp_path, **keys)
    content = yaml.safe_load(path.read_text())
    del content["task"]["splits"]["calibration"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match="needs examples to calibrate on"):
        Recipe.from_yaml(path)


def test_a_fused_graph_is_not_made_portable(tmp_path):
    path = recipe(tmp_path, method="fp16")
    content = yaml.safe_load(path.read_text())
    content["steps"].insert(0, {"step": "export"})
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match="found one that export fused; leave that step out"):
        Recipe.from_yaml(path)


def test_nothing_to_quantize_is_an_error(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "m.onnx")
    for method in METHODS:
        with pytest.raises(
            QuantizationError, match=f"{re.escape(method)}: found no matrix product"
        ):
            quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", method, Options())
