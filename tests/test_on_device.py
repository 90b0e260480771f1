"""What stays on the device: a batch and its outputs, and the cache between two tokens."""

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import write_model
from onnx import TensorProto, helper, numpy_helper

from benchmarks.worker import Worker
from exporters.onnx.binding import keeping_cache, resident
from exporters.onnx.session import predictor
from pipeline import on_device
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
    predict = resident(counter, device="cpu", threads=1)
    first, second = ({"input_ids": np.ones((2, length), np.int64)} for length in (3, 5))
    for batch in (first, first, second, second, first):
        assert predict(batch) == {}
    lengths = [shape[1] for shape in copies if len(shape) == 2]  # the others are empty caches
    assert lengths == [3, 5, 3]


def test_a_torch_model_computes_what_was_put_there(tmp_path):
    model = write_model(tmp_path)
    predict = open_resident(tmp_path, device="cpu", threads=1)
    assert predict(BATCH) == {}
    too_long = {name: np.resize(x, (1, 9999)) for name, x in BATCH.items()}
    assert model.config.max_position_embeddings < 9999
    with pytest.raises((IndexError, RuntimeError)):
        predict(too_long)


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
    assert 0 < result["device_ms"] < result["latency_ms"]["p50"]
    assert found["device_bytes"] > sum(p.nbytes for p in model.parameters())
    assert result["watts"] > 0


@pytest.mark.gpu
def test_a_graph_on_a_gpu_keeps_its_cache_there(counter):
    decode = keeping_cache(counter, device="cuda", threads=1)
    found = decode({"input_ids": np.asarray([[1, 2]])})
    assert found["present.0.key"].device_name() == "cuda"
    assert found["logits"] == 6
    predict = resident(counter, device="cuda", threads=1)
    assert predict({"input_ids": np.asarray([[1, 2]])}) == {}
