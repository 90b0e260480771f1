"""`bench`: artifacts of any format in turns, one process each."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import torch
from conftest import ROWS, secateur, write_model
from onnx import TensorProto, helper, numpy_helper

from benchmarks import loadgen, worker
from benchmarks.data import DataError
from benchmarks.machine import Unavailable
from pipeline import candidates, turns
from pipeline.bench import bench
from pipeline.checkpoint import ModelError
from pipeline.turns import Settings

QUICK = ("--sequence", 8, "--threads", 1, "--seconds", 1)


def write_graph(folder, width=8, classes=3):
    """Write a graph that looks tokens up and multiplies, beside the tokenizer of a tiny model."""
    write_model(folder)
    (folder / "model.safetensors").unlink()
    info = helper.make_tensor_value_info
    table = np.ones((99, width), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("MatMul", ["rows", "w"], ["logits"]),
        ],
        "g",
        [info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [info("logits", TensorProto.FLOAT, ["batch", "sequence", classes])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.ones((width, classes), np.float32), "w"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder


def test_any_format_beside_any_other(tmp_path):
    write_model(tmp_path / "model")
    write_graph(tmp_path / "graph")
    written = tmp_path / "bench.json"
    done = secateur(
        "bench", tmp_path / "model", tmp_path / "graph", "--batch", "1,2", *QUICK, "--json", written
    )
    assert done.returncode == 0, done.stderr
    assert "single-stream, 2x8" in done.stdout
    whole, graph = json.loads(written.read_text())["artifacts"]
    assert (whole["runtime"], graph["runtime"]) == ("torch", "onnxruntime")
    assert [result["verdict"] for result in whole["results"]] == ["first", "first"]
    assert [result["multiply_adds"] for result in graph["results"]] == [
        {"fp32": batch * 8 * 8 * 3} for batch in (1, 2)
    ]
    for result in (*whole["results"], *graph["results"]):
        assert result["ratio"]["low"] <= result["ratio"]["value"] <= result["ratio"]["high"]
        assert result["latency_ms"]["samples"] == 2 * result["turns"] >= 12
        assert 0 < result["limit"]["compute"] < 1
    assert graph["results"][0]["verdict"] == "faster"
    assert whole["parameters"] > 0 < whole["peak_rss_bytes"]


@pytest.mark.parametrize("scenario", ["multi-stream", "offline", "server"])
def test_a_scenario_gives_its_own_numbers(tmp_path, scenario, monkeypatch):
    monkeypatch.setattr(turns, "SERVER_SECONDS", 0.2)
    monkeypatch.setattr(turns, "LOADGEN", {"seconds": 0.1, "queries": 8})
    here = find_spec("mlperf_loadgen") is not None
    found = bench(
        [write_graph(tmp_path / "graph"), tmp_path / "graph"],
        Settings(scenario, loads=((2, 8),), threads=1, seconds=1, rounds=6, loadgen=here),
    )
    first, second = found["artifacts"]
    assert [first["name"], second["name"]] == ["graph #1", "graph #2"]
    for result in (first["results"][0], second["results"][0]):
        if scenario == "offline":
            assert result["instances"] == 1
            assert result["throughput_per_s"] > 0
        else:
            assert result["latency_ms"]["p50"] > 0
        assert not here or result["loadgen"]["result_query_count"] >= 1
    if scenario == "server":
        assert first["results"][0]["rate_per_s"] == second["results"][0]["rate_per_s"] > 0


def test_generation_has_a_fixed_length(tmp_path):
    write_model(tmp_path / "model", "llama")
    found = bench(
        [tmp_path / "model"],
        Settings("generation", loads=((2, 8),), threads=1, seconds=1, rounds=6, new_tokens=5),
    )
    (result,) = found["artifacts"][0]["results"]
    assert result["first_token_ms"]["samples"] == result["turns"]
    assert result["token_ms"]["samples"] == 4 * result["turns"]
    assert result["tokens_per_s"] > 0


def test_the_lines_of_a_file_are_what_is_asked(tmp_path):
    write_model(tmp_path / "model")
    file = tmp_path / "lines.txt"
    file.write_text("good film\n\nbad plot\n")
    found = candidates.find(tmp_path / "model", "cpu")
    given = candidates.inputs(found, candidates.texts(file), 2, 6)
    tokenized = [2, 4, 10, 3, 2, 7]
    assert given["input_ids"].ravel().tolist()[:6] == tokenized
    assert given["attention_mask"].tolist() == [[1] * 6] * 2


def test_what_is_no_artifact_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    write_model(tmp_path / "model")
    write_graph(tmp_path / "graph")
    with pytest.raises(ModelError, match=r"empty: found no artifact, expected a folder with onnx/"):
        candidates.find(tmp_path / "empty", "cpu")
    with pytest.raises(ModelError, match="found a graph that secateur did not write"):
        candidates.generator(tmp_path / "graph", "cpu")
    with pytest.raises(DataError, match=r"--text: .*empty.txt: found no text"):
        candidates.texts(tmp_path / "empty.txt")
    with pytest.raises(DataError, match=r"--text: .*nowhere: cannot be read"):
        candidates.texts(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"--sequence: .*found 65, expected at most 64"):
        candidates.inputs(candidates.find(tmp_path / "model", "cpu"), [ROWS[0][0]], 1, 65)
    shutil.copy(tmp_path / "graph" / "model.onnx", tmp_path / "alone.onnx")
    with pytest.raises(ModelError, match=r"found no config.json, expected one, and the tokenizer"):
        candidates.find(tmp_path / "alone.onnx", "cpu")
    done = secateur("bench", tmp_path / "empty")
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    done = secateur("bench", tmp_path / "model", "--threads", 4096)
    assert done.returncode == 4
    assert "--threads: found 4096, expected at most" in done.stderr
    assert secateur("bench", tmp_path / "model", "--batch", 0).returncode == 2


def test_loadgen_may_be_missing_or_have_no_such_scenario(monkeypatch):
    with pytest.raises(Unavailable, match="found the scenario generation, expected one of single"):
        loadgen.available("generation")
    monkeypatch.setattr(loadgen, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="mlcommons-loadgen is not installed; install the extra"):
        loadgen.available("server")


@pytest.mark.parametrize(
    ("fault", "message", "status"),
    [
        ("elsewhere", "found CPUExecutionProvider, expected CUDAExecutionProvider", 4),
        ("broken", "status 1: ValueError: no such artifact", 5),
        ("faulty", "ended by SIGSEGV", 5),
        ("crasher", "status 1: RuntimeError: the runtime gave up", 5),
        ("killed", "ended by SIGKILL; it may have run out of memory", 5),
        ("leaving", "status 3", 5),
        ("greedy", "Unable to allocate 1.00 TiB", 5),
        ("hanging", "no reply within", 5),
    ],
)
def test_a_fault_is_one_line_and_leaves_no_process(tmp_path, monkeypatch, fault, message, status):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(worker, "REPLY_SECONDS", 8.0)
    monkeypatch.setitem(candidates.OPENERS, "torch", f"known_predictors:{fault}")
    write_model(tmp_path / "model")
    done = secateur("bench", tmp_path / "model", *QUICK, "--json", tmp_path / "bench.json")
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bench.json").exists()
    lines = [
        " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])
    ]
    assert not [line for line in lines if "benchmarks.worker" in line and str(tmp_path) in line]


def test_a_damaged_graph_and_a_missing_gpu_are_told(tmp_path):
    folder = write_graph(tmp_path / "graph")
    content = (folder / "model.onnx").read_bytes()
    if not torch.cuda.is_available():
        done = secateur("bench", folder, *QUICK, "--device", "cuda")
        assert done.returncode == 4
        assert "expected CUDAExecutionProvider" in done.stderr
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])
    done = secateur("bench", folder, *QUICK)
    assert done.returncode == 5
    assert "ONNX Runtime cannot open it" in done.stderr
