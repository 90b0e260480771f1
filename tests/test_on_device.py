"""What stays on the device: a batch and its outputs, and the cache between two tokens."""

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import write_model, write_recipe
from onnx import TensorProto, helper, numpy_helper

from benchmarks.worker import Worker
from exporters.onnx.binding import keeping_cache, resident
from exporters.onnx.session import predictor
from pipeline import on_device, run
from pipeline.bench import bench
from pipeline.checkpoint import open_resident
from pipeline.openers import RESIDENT
from pipeline.turns import Settings

BATCH = {"input_ids": np.arange(3, 11).reshape(2, 4), "attention_mask": np.ones((2, 4), np.int64)}


@pytest.fixture
def counter(tmp_path):
    """A graph that adds its tokens to a cache, and says how much there is."""
    info, whole = helper.make_tensor_value_info, ["b", 1, "past", 2]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input_ids"], ["tokens"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["tokens", "axes"], ["rows"]),
            helper.make_node("Concat", ["rows", "rows"], ["new"], axis=3),
            helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
            helper.make_node("ReduceSum", ["present.0.key"], ["logits"]),
        ],
        "g",
        [info("input_ids", TensorProto.INT64, ["b", "t"]),
         info("past_key_values.0.key", TensorProto.FLOAT, whole)],
        [info("logits", TensorProto.FLOAT, None), info("present.0.key", TensorProto.FLOAT, whole)],
        [numpy_helper.from_array(np.asarray([1, 3]), "axes")],
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path
    )
    return path


def test_a_cache_goes_on_without_becoming_an_array(counter):
    decode = keeping_cache(counter, device="cpu", threads=1)
    plain = predictor(counter, device="cpu", threads=1)
    given = fed = {"input_ids": np.asarray([[1, 2], [3, 4]])}
    for token in (5, 6):
        found, expected = decode(given), plain(fed)
        assert found["logits"] == expected["logits"]
        assert isinstance(found["present.0.key"], onnxruntime.OrtValue)
        assert np.array_equal(found["present.0.key"].numpy(), expected["present.0.key"])
        tokens = np.full((2, 1), token)
        given = {"input_ids": tokens, "past_key_values.0.key": found["present.0.key"]}
        fed = {"input_ids": tokens, "past_key_values.0.key": expected["present.0.key"]}


def test_a_batch_is_put_there_once_and_computed_at_every_call(counter, monkeypatch):
    copies, real = [], onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(
        onnxruntime.OrtValue,
        "ortvalue_from_numpy",
        lambda array, *where: copies.append(array.shape) or real(array, *where),
    )
    computed, compute = [], onnxruntime.InferenceSession.run_with_iobinding

    def noted(session, binding):
        compute(session, binding)
        computed.append(binding.get_outputs()[0].numpy().item())

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", noted)
    predict = resident(counter, device="cpu", threads=1)
    first, second = ({"input_ids": np.ones((2, length), np.int64)} for length in (3, 5))
    for batch in (first, first, second, second, first):
        assert predict(batch) == {}
    lengths = [shape[1] for shape in copies if len(shape) == 2]  # the others are empty caches
    assert lengths == [3, 5, 3]
    assert computed == [4 * length for length in (3, 3, 5, 5, 3)]


def test_a_torch_model_computes_what_was_put_there(tmp_path, monkeypatch):
    model = write_model(tmp_path)
    seen = []
    monkeypatch.setattr(
        type(model), "forward", lambda _, input_ids, **others: seen.append(input_ids.tolist())
    )
    predict = open_resident(tmp_path, device="cpu", threads=1)
    other = {name: x[:, :3] for name, x in BATCH.items()}
    assert [predict(each) for each in (BATCH, BATCH, other, BATCH)] == [{}] * 4
    whole, part = (each["input_ids"].tolist() for each in (BATCH, other))
    assert seen == [whole, whole, part, whole]


def test_openers_are_what_a_worker_opens(tmp_path, counter):
    write_model(tmp_path / "model")
    batches = {"torch": BATCH, "onnxruntime": {"input_ids": BATCH["input_ids"]}}
    places = {"torch": tmp_path / "model", "onnxruntime": counter}
    for runtime, place in places.items():
        with Worker(RESIDENT[runtime], place, device="cpu", threads=1) as worker:
            worker.hold(0, batches[runtime])
            assert min(worker.time(0, 3)) > 0
            assert worker.device_bytes() is None
        assert on_device.times_ms(runtime, place, [BATCH], device="cpu", threads=1) is None


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_told_from_its_copies(tmp_path):
    model = write_model(tmp_path)
    settings = Settings(loads=((8, 16),), device="cuda", seconds=2)
    (found,) = bench([tmp_path], settings)["artifacts"]
    result = found["results"][0]
    assert 0 < result["resident_ms"] < 2 * result["latency_ms"]["p50"]
    assert found["device_bytes"] > sum(p.nbytes for p in model.parameters())


@pytest.mark.gpu
def test_a_graph_on_a_gpu_is_measured_there(tmp_path):
    recipe = write_recipe(
        tmp_path,
        baseline="original",
        target={"device": "cuda", "loads": [{"batch": 2, "sequence": 16}], "rounds": 6},
        steps=[{"step": "export", "format": "onnx"}],
        budget={"max_drop": 0.9, "max_energy": 9.0, "baseline_floor": -1.0},
    )
    stage = run(recipe, tmp_path / "out").stages[-1]
    assert stage.memory["device_peak_bytes"] > stage.size_bytes
    assert stage.loads[0].resident_ms > 0
    assert stage.loads[0].joules > 0
    (found,) = bench(
        [tmp_path / "out" / "artifact"], Settings(loads=((2, 16),), device="cuda", seconds=2)
    )["artifacts"]
    assert found["results"][0]["nodes"]["CUDAExecutionProvider"] > 0


@pytest.mark.gpu
def test_a_graph_on_a_gpu_keeps_its_cache_there(counter):
    decode = keeping_cache(counter, device="cuda", threads=1)
    found = decode({"input_ids": np.asarray([[1, 2]])})
    assert found["present.0.key"].device_name() == "cuda"
    assert found["logits"] == 6
    predict = resident(counter, device="cuda", threads=1)
    assert predict({"input_ids": np.asarray([[1, 2]])}) == {}
