"""The library that builds and runs engines, what it says when something fails, and the GPU.

TensorRT (`tensorrt`) and TensorRT for RTX (`tensorrt_rtx`) share their Python interface, but for a
few calls.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Final

from exporters import ExportError, MissingDependency

FULL, RTX = "tensorrt", "tensorrt_rtx"
EXTRAS: Final = {FULL: "tensorrt", RTX: "tensorrt-rtx"}
"""Library -> the extra of pyproject.toml that installs it."""


@dataclass(frozen=True)
class Gpu:
    """The GPU that is here; `compute_capability` as `8.9`."""

    name: str
    compute_capability: str


def gpu() -> Gpu | None:
    """Return the first CUDA device, if there is one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}.{minor}")


def library(name: str) -> ModuleType:
    """Return the module of a library.

    Raises:
        ExportError: it is none of the two.
        MissingDependency: it is not installed.
    """
    if name not in EXTRAS:
        raise ExportError(f"engine: found the library {name!r}, expected one of {sorted(EXTRAS)}")
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"{name}: cannot be imported ({error}); pip install -e '.[{EXTRAS[name]}]'"
        ) from error


def logger(trt: Any) -> Any:
    """Return a logger that keeps the errors, in `errors`, and prints nothing."""

    class Kept(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in {trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR}:
                self.errors.append(" ".join(message.split()))

    return Kept()


def version(trt: Any) -> tuple[int, ...]:
    """Return a library's version as numbers."""
    return tuple(int(part) for part in trt.__version__.split(".") if part.isdigit())
