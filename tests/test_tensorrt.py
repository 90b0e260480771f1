"""Engines: built ahead of time without a GPU, refused with reasons, and run only where one is.

What an engine computes is tested on a GPU (`pytest -m gpu`); that it has the graph's precisions is
read from what TensorRT documents of its inspector.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import write_recipe
from onnx import TensorProto, helper
from tiny_models import tiny

from exporters import ExportError, MissingDependency, NotHere, tensorrt
from exporters import onnx as exporter
from exporters.tensorrt.engine import invalid, layers, refuse_shapes, runs_here
from exporters.tensorrt.library import Gpu, library
from pipeline import prune_heads, prune_neurons
from pipeline.quantization import Options, quantize
from pipeline.recipe import Recipe
from pipeline.runner import check_target, run
from pipeline.store import verify

AXES = {"batch": (1, 2, 32), "sequence": (1, 16, 20)}
RTX = tensorrt.Settings(compute_capabilities=(8.6, 8.9))
INT8 = {"portable": True, "calibration": lambda: iter([inputs(8, n) for n in range(5, 15)])}
# Name -> method, its options, and how many products have which precision: in each of two layers
# six with weights and two of activations; and those of pooler and classifier.
GRAPHS = {
    "fp32": (None, {}, {"fp32": 18}),
    "fp16": ("fp16", {}, {"fp16": 18}),
    "bf16": ("bf16", {}, {"bf16": 18}),
    "int8": ("int8-static", INT8, {"int8": 14, "fp32": 4}),
    "int8 with tables": ("int8-static", INT8 | {"embeddings": True}, {"int8": 14, "fp32": 4}),
    "int8 weights": ("int8-weights", {"portable": True}, {"int8": 14, "fp32": 4}),
    "int4 weights": ("int4-weights", {"portable": True, "block_size": 16}, {"int4": 14, "fp32": 4}),
}
REFUSED = {
    "zero points": ("int8-static", INT8 | {"portable": False}, "QuantizeLinear .*zero.?[pP]oint"),
    "ranges as they come": ("int8-dynamic", {}, "refuses the graph: DynamicQuantizeLinear"),
    "four bits unsigned": (
        "int4-weights",
        {"portable": True, "symmetric": False},
        "refuses the graph: a constant .*Failed to import initializer",
    ),
    "blocks of ONNX Runtime": ("int4-weights", {}, "refuses the graph: MatMulNBits"),
}


def inputs(batch: int, sequence: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch + sequence)
    ids = generator.integers(3, 99, (batch, sequence))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """Give a function that returns a pruned model's graph in some precision."""
    folder = tmp_path_factory.mktemp("graphs")
    model = tiny("bert", num_hidden_layers=2)
    prune_heads(model, {0: [1], 1: [0, 2]})
    prune_neurons(model, {1: [*range(20)]})
    samples = [inputs(2, 11), inputs(3, 17)]
    source = folder / "fp32.onnx"
    exporter.export(model, samples, axes=("batch", "sequence"), path=source, fuse_for=None)

    def get(name: str) -> Path:
        method, options, _ = (GRAPHS | REFUSED)[name]
        path = folder / f"{name}.onnx"
        if not path.is_file():
            quantize(source, path, method, Options(**options))
        return path

    return get


def build(path, folder, settings=RTX, **options):
    return tensorrt.build(path, folder, tensorrt.profile(path, AXES), settings, **options)


@pytest.fixture(scope="module")
def engine(graph, tmp_path_factory):
    """Give the folder of an int8 engine."""
    folder = tmp_path_factory.mktemp("engine")
    build(graph("int8"), folder)
    return folder


def changed(engine, folder, change):
    """Return a copy of an engine's folder, of which the description was changed."""
    shutil.copytree(engine, folder)
    path = folder / tensorrt.ENGINE
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("name", GRAPHS)
def test_an_engine_is_built_ahead_of_time(tmp_path, graph, name):
    path = graph(name)
    steps = []

    def track(items, what, total):
        assert what == "building the engine"
        for item in items:
            steps.append(total)
            yield item

    about = build(path, tmp_path, track=track)
    assert about == tensorrt.described(tmp_path)
    plan = (tmp_path / tensorrt.PLAN).read_bytes()
    assert len(plan) == about["plan"]["bytes"] > path.stat().st_size
    assert about["plan"]["sha256"] == hashlib.sha256(plan).hexdigest()
    assert about["onnx"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert about["library"]["name"] == "tensorrt_rtx"
    assert about["settings"]["compute_capabilities"] == [8.6, 8.9]
    assert about["precisions"]["asked"] == GRAPHS[name][2]
    shapes = {"min": [1, 1], "opt": [2, 16], "max": [32, 20]}
    assert about["profile"] == {"input_ids": shapes, "attention_mask": shapes}
    assert about["inputs"]["input_ids"] == {"dtype": "int64", "shape": [-1, -1]}
    # Inputs and outputs are as they were, whatever is between.
    assert about["outputs"] == {"logits": {"dtype": "float32", "shape": [-1, 2]}}
    assert len(steps) == steps[0] > 1


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_that_cannot_be_read_is_refused_with_the_reason(tmp_path, graph, name):
    with pytest.raises(ExportError, match=REFUSED[name][2]):
        build(graph(name), tmp_path)
    assert not (tmp_path / tensorrt.PLAN).exists()


def test_weights_beside_the_graph_are_found_and_hashed(tmp_path, graph):
    beside = tmp_path / "model.onnx"
    data = tmp_path / "model.onnx_data"
    model = onnx.load(graph("fp32"))
    onnx.save(model, beside, save_as_external_data=True, location=data.name, size_threshold=0)
    about = build(beside, tmp_path)
    assert about["onnx"][data.name] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert about["plan"]["bytes"] > data.stat().st_size


def test_a_gpu_that_the_graph_cannot_be_built_for_is_said(tmp_path, graph):
    turing = tensorrt.Settings(compute_capabilities=(7.5,))
    with pytest.raises(ExportError, match=r"cannot build an engine: .*FP32 GEMM is not supported"):
        build(graph("fp32"), tmp_path, turing)
    unknown = tensorrt.Settings(compute_capabilities=(8.6, 9.0))
    with pytest.raises(NotHere, match=r"found 9\.0, expected some of 7\.5, 8\.0, 8\.6, .*of Tens"):
        build(graph("fp32"), tmp_path, unknown)


def test_an_interrupt_ends_the_build(tmp_path, graph):
    def interrupted(items, what, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(graph("fp32"), tmp_path, track=interrupted)
    assert not (tmp_path / tensorrt.PLAN).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize(
    "key", [{"version_compatible": True}, {"timing_cache": "cache"}, {"library": "tensorrt"}]
)
def test_what_needs_the_gpu_to_build_is_refused_without_one(key):
    with pytest.raises(
        NotHere, match="tensorrt: found no CUDA device, expected one: TensorRT builds"
    ):
        tensorrt.available(tensorrt.Settings(**key))


def test_other_axes_than_batch_and_sequence_are_refused(tmp_path):
    info = helper.make_tensor_value_info
    past = info("past", TensorProto.FLOAT, ["batch", 4, "past_sequence", 8])
    image = info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])
    for given in (past, image):
        out = info("y", TensorProto.FLOAT, None)
        nodes = [helper.make_node("Identity", [given.name], ["y"])]
        onnx.save(helper.make_model(helper.make_graph(nodes, "g", [given], [out])), tmp_path / "g")
        if given is image:
            shapes = tensorrt.profile(tmp_path / "g", {"batch": (1, 2, 32)})
            assert shapes["image"]["max"] == [32, 3, 8, 8]
        else:
            with pytest.raises(ExportError, match="found the dynamic axis 'past_sequence' of the"):
                tensorrt.profile(tmp_path / "g", AXES)


@pytest.mark.parametrize("shape", [(33, 16), (2, 21), (2, 0), (2,)])
def test_shapes_outside_the_profile_are_refused(engine, shape):
    about = tensorrt.described(engine)
    refuse_shapes(about, inputs(1, 1))
    refuse_shapes(about, inputs(32, 20))
    ids = np.zeros(shape, np.int64)
    message = r"input_ids: found the shape \(.*, expected one from \(1, 1\) to \(32, 20\), the prof"
    with pytest.raises(ValueError, match=message):
        refuse_shapes(about, inputs(2, 16) | {"input_ids": ids})
    with pytest.raises(ValueError, match="attention_mask: found no such input, expected"):
        refuse_shapes(about, {"input_ids": np.zeros((2, 16), np.int64)})


def test_a_plan_that_was_changed_is_refused_before_all_else(tmp_path, engine):
    """Without a GPU an intact engine is refused too, but later: the hash comes first."""
    shutil.copytree(engine, tmp_path, dirs_exist_ok=True)
    plan = bytearray((tmp_path / tensorrt.PLAN).read_bytes())
    plan[len(plan) // 2] ^= 1
    (tmp_path / tensorrt.PLAN).write_bytes(plan)
    # Not even the library is looked for.
    path = tmp_path / tensorrt.ENGINE
    path.write_text(path.read_text().replace('"tensorrt_rtx"', '"no_such_library"'))
    with pytest.raises(
        ExportError, match=r"model\.plan: found sha256 .*changed after it was built"
    ):
        tensorrt.open_predictor(tmp_path, device="cuda", threads=1)


def test_engines_run_on_gpus_alone(engine):
    with pytest.raises(NotHere, match=r"target\.device: found cpu, expected cuda"):
        tensorrt.open_predictor(engine, device="cpu", threads=1)
    if not torch.cuda.is_available():
        with pytest.raises(NotHere, match="found no CUDA device, expected one; engines run on"):
            tensorrt.open_predictor(engine, device="cuda", threads=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_driver_no_engine_is_opened(engine):
    about, plan = tensorrt.described(engine), (engine / tensorrt.PLAN).read_bytes()
    trt = library("tensorrt_rtx")
    assert invalid(trt, plan)
    with pytest.raises(ExportError, match="engine: tensorrt_rtx cannot open the engine: "):
        layers(trt, about, plan)


def test_an_engine_of_another_version_asks_for_a_rebuild(tmp_path, engine):
    folder = changed(engine, tmp_path / "e", lambda a: a["library"].update(version="1.2.0.54"))
    message = r"found tensorrt_rtx .*, expected tensorrt_rtx 1\.2\.0\.54, .*`secateur rebuild .*/e`"
    with pytest.raises(NotHere, match=message):
        tensorrt.check(folder)

    def compatible(about):
        about["library"]["version"] = "1.2.0.54"
        about["settings"]["version_compatible"] = True

    folder = changed(engine, tmp_path / "compatible", compatible)
    if not torch.cuda.is_available():  # it gets past the version
        with pytest.raises(NotHere, match="found no CUDA device"):
            tensorrt.check(folder)


def test_an_engine_of_another_gpu_asks_for_a_rebuild(tmp_path, engine, monkeypatch):
    monkeypatch.setattr("exporters.tensorrt.engine.gpu", lambda: Gpu("NVIDIA A100", "8.0"))
    message = (
        r"found NVIDIA A100 \(8\.0\), expected compute capability 8\.6 or 8\.9, which .*rebuil"
    )
    with pytest.raises(NotHere, match=message):
        tensorrt.check(engine)

    def everywhere(about):
        about["settings"]["compute_capabilities"] = []

    folder = changed(engine, tmp_path / "everywhere", everywhere)
    if not torch.cuda.is_available():  # the library looks for itself
        with pytest.raises(
            NotHere, match=r"says that the engine cannot run on NVIDIA A100 \(8\.0\)"
        ):
            tensorrt.check(folder)
    about = tensorrt.described(folder)
    assert runs_here(about, Gpu("NVIDIA A100", "8.0"))

    # TensorRT builds for the very GPU that it is built on.
    here = {"name": "NVIDIA A100", "compute_capability": "8.0"}
    full = about | {"library": {"name": "tensorrt", "version": "11.4.0"}, "built_on": here}
    assert runs_here(full, Gpu("NVIDIA A100", "8.0"))
    assert not runs_here(full, Gpu("NVIDIA A30", "8.0"))


def test_what_is_no_engine_is_said(tmp_path, engine):
    with pytest.raises(ExportError, match=r"engine\.json: no such file; .* holds no engine"):
        tensorrt.described(tmp_path)
    folder = changed(engine, tmp_path / "e", lambda about: about.update(schema=2))
    with pytest.raises(ExportError, match="found another schema, expected 1"):
        tensorrt.described(folder)
    with pytest.raises(ExportError, match=r"found the library 'os', expected one of \['tensorrt'"):
        tensorrt.check(changed(engine, tmp_path / "os", lambda a: a["library"].update(name="os")))
    (folder / tensorrt.ENGINE).write_text("{")
    with pytest.raises(ExportError, match="not JSON"):
        tensorrt.described(folder)


@pytest.mark.parametrize(
    ("name", "extra"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-r")]
)
def test_a_missing_library_names_the_extra(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(MissingDependency, match=rf"{name}: cannot be imported .*\[{extra}"):
        library(name)


def test_a_gpu_that_is_not_known_is_refused_before_the_first_step():
    steps = [{"step": "export", "format": "tensorrt", "compute_capabilities": [9.0]}]
    task = {"kind": "text-classification", "data": "x", "splits": {"gate": "train"}}
    content = {"model": {"source": "x"}, "task": task, "steps": steps, "budget": {"max_size": 1}}
    with pytest.raises(NotHere, match=r"compute_capabilities: found 9\.0, expected some of"):
        check_target(Recipe.model_validate(content))


def test_an_engine_that_was_not_run_is_not_said_to_be_measured(built_ahead):
    folder, report = built_ahead
    _, quantize_stage, engine_stage = report.stages
    assert (engine_stage.format, engine_stage.runtime) == ("tensorrt", "onnxruntime")
    assert engine_stage.gain_note.endswith("it was built from, in ONNX Runtime")
    assert engine_stage.details["measured"].startswith("the engine was built and not run")
    assert "measured" not in quantize_stage.details
    for name in ("report.md", "report.html"):
        assert "the engine was built and not run" in (folder / "out" / name).read_text()
    # It is the very file of the stage before that was measured.
    assert engine_stage.score == quantize_stage.score
    assert engine_stage.loads[0].latency_ms == quantize_stage.loads[0].latency_ms
    artifact = verify(folder / "out" / "artifact")
    assert artifact.about["measured"] == engine_stage.details["measured"]
    before = Path(quantize_stage.folder, "onnx", "model.onnx")
    after = artifact.folder / "onnx" / "model.onnx"
    assert before.read_bytes() == after.read_bytes()
    about = tensorrt.described(artifact.folder)
    assert about["onnx"]["model.onnx"] == hashlib.sha256(after.read_bytes()).hexdigest()
    assert about["plan"]["bytes"] == engine_stage.size_bytes
    # The one load is 2x16; batches of the evaluation have 32 windows, of 16 tokens at most.
    shapes = {"min": [1, 1], "opt": [2, 16], "max": [32, 16]}
    assert engine_stage.details["profile"]["input_ids"] == shapes


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "int8", "int4 weights"])
def test_an_engine_gives_what_its_graph_gives(tmp_path, graph, name):
    path = graph(name)
    about = build(path, tmp_path, tensorrt.Settings())
    asked, found = about["precisions"]["asked"], about["precisions"]["found"]
    assert found is None or set(found) <= set(asked)
    predict = tensorrt.open_predictor(tmp_path, device="cuda", threads=1)
    reference = graph("fp32" if name == "bf16" else name)
    expected = exporter.predictor(reference, device="cpu", threads=1)
    for shape in ((1, 5), (2, 16), (32, 20), (1, 5)):
        given = inputs(*shape)
        exact, near = expected(given)["logits"], predict(given)["logits"]
        assert near.dtype == np.float32
        assert np.corrcoef(exact.ravel(), near.ravel())[0, 1] > 0.99
    with pytest.raises(ValueError, match="the profile that the engine was built with"):
        predict(inputs(33, 16))


@pytest.mark.gpu
def test_an_engine_is_measured_itself_on_a_gpu(tmp_path):
    path = write_recipe(
        tmp_path,
        baseline="original",
        target={
            "device": "cuda",
            "runtime": "tensorrt",
            "loads": [{"batch": 2, "sequence": 16}],
            "rounds": 6,
        },
        steps=[{"step": "quantize", "method": "fp16"}, {"step": "export", "format": "tensorrt"}],
        budget={"max_drop": 0.9, "baseline_floor": -1.0},
    )
    report = run(path, tmp_path / "out")
    assert [stage.runtime for stage in report.stages] == ["tensorrt"] * 3
    assert "measured" not in report.stages[-1].details


@pytest.mark.gpu
def test_a_timing_cache_is_written_and_used_again(tmp_path, graph):
    pytest.importorskip("tensorrt")
    cache = tmp_path / "cache"
    settings = tensorrt.Settings(timing_cache=str(cache), workspace_bytes=1 << 28)
    build(graph("fp16"), tmp_path / "first", settings)
    size = cache.stat().st_size
    build(graph("fp16"), tmp_path / "second", settings)
    assert cache.stat().st_size == pytest.approx(size, rel=0.1)
    cache.write_bytes(b"not a cache")
    with pytest.raises(ExportError, match="a timing cache of another GPU or version; remove it"):
        build(graph("fp16"), tmp_path / "third", settings)
