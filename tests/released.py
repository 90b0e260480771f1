"""Folders that look like what is released, as far as their files go."""

import json

import numpy as np
from conftest import multiplying, write_model

from pipeline.checkpoint import predictor
from pipeline.manifest import seal


def released(folder):
    """Write an artifact of one graph."""
    (folder / "onnx").mkdir(parents=True)
    graph = multiplying(np.ones((2, 2), np.float32))
    (folder / "onnx" / "model.onnx").write_bytes(graph.SerializeToString())
    inputs, outputs = {"x": np.ones((1, 2), np.float32)}, {"y": np.full((1, 2), 2, np.float32)}
    finish(folder, "onnxruntime", inputs, outputs)


def released_torch(folder):
    """Write an artifact of a torch model."""
    model = write_model(folder)
    inputs = {"input_ids": np.arange(8).reshape(2, 4)}
    finish(folder, "torch", inputs, predictor(model)(inputs))


def finish(folder, runtime, inputs, outputs):
    """Add how it is run and what it gave, and the manifest."""
    settings = {"runtime": runtime, "device": "cpu", "threads": 1, "tolerance": 0.1}
    (folder / "inference.json").write_text(json.dumps(settings))
    recorded = {f"input.{name}": array for name, array in inputs.items()}
    recorded |= {f"output.{name}": array for name, array in outputs.items()}
    np.savez(folder / "golden.npz", allow_pickle=False, **recorded)
    seal(folder, {"verdict": {"outcome": "pass"}})
