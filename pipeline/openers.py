"""What opens an artifact's folder, in each runtime.

A name, so that what opens it is imported only where it is opened; see benchmarks.worker.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final

OPENERS: Final[Mapping[str, str]] = {
    "torch": "pipeline.checkpoint:open_predictor",
    "onnxruntime": "exporters.onnx:open_predictor",
    "tensorrt": "exporters.tensorrt:open_predictor",
}


def opener(runtime: str) -> Callable[..., Any]:
    """Return the function that opens a folder: `opener(folder, device=..., threads=...)`."""
    module, _, function = OPENERS[runtime].partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found
