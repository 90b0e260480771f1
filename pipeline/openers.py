"""What opens an artifact's folder, in each runtime.

A name, so that what opens it is imported only where it is opened; see benchmarks.worker.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final

from benchmarks.machine import Unavailable
from exporters import onnx

OPENERS: Final[Mapping[str, str]] = {
    "torch": "pipeline.checkpoint:open_predictor",
    "onnxruntime": "exporters.onnx:open_predictor",
    "tensorrt": "exporters.tensorrt:open_predictor",
}


RESIDENT: Final[Mapping[str, str]] = {
    "torch": "pipeline.checkpoint:open_resident",
    "onnxruntime": "exporters.onnx:resident",
    "tensorrt": "exporters.tensorrt:open_resident",
}
"""What opens a folder, or for ONNX Runtime a graph, whose outputs stay on the device."""


def opener(runtime: str) -> Callable[..., Any]:
    """Return the function that opens a folder: `opener(folder, device=..., threads=...)`."""
    module, _, function = OPENERS[runtime].partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found


def check(runtime: str, device: str, where: str = "target.device") -> None:
    """Make sure that a runtime can use a device of this machine, which a user named `where`.

    Raises:
        Unavailable: there is no such device, or the runtime cannot use it.
        MissingDependency: onnxruntime is not installed.
    """
    if runtime == "onnxruntime":
        providers = onnx.runtime().get_available_providers()
        if device == "cuda" and onnx.PROVIDERS[device] not in providers:
            raise Unavailable(
                f"{where}: found the providers {providers}, expected CUDAExecutionProvider;"
                " install the extra `gpu` in place of `cpu`"
            )
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise Unavailable(f"{where}: found no CUDA device, expected one; use cpu")
