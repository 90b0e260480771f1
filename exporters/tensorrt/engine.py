"""An engine in an artifact's folder: what it is, whether it may be opened here, and how it runs.

A plan is code: to deserialise one that somebody changed is to run what they put there. So its
sha256 is compared first, always, and what is compared is what is then deserialised. The sha256 lies
beside the plan, in `ENGINE`. That keeps damage out, and a plan put there alone; not somebody who
changes both, and the manifest: where a folder comes from is for its user to know.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from exporters import ExportError, NotHere, without_copies
from exporters.tensorrt.library import FULL, Gpu, gpu, library, logger, version

PLAN: Final = Path("tensorrt", "model.plan")
ENGINE: Final = Path("tensorrt", "engine.json")
SCHEMA: Final = 1
KEYS: Final = {"library", "plan", "onnx", "inputs", "outputs", "profile", "built_on", "settings"}

Arrays = Mapping[str, NDArray[Any]]
Buffer = bytes | memoryview


def described(folder: Path) -> dict[str, Any]:
    """Return what is known of the engine in `folder`.

    Raises:
        ExportError: there is none, or it is described otherwise.
    """
    path = folder / ENGINE
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path}: no such file; {folder} holds no engine") from None
    except ValueError as error:
        raise ExportError(f"{path}: not JSON: {error}") from None
    if not isinstance(about, dict) or about.get("schema") != SCHEMA or not about.keys() >= KEYS:
        raise ExportError(f"{path}: found another schema, expected {SCHEMA}, of secateur")
    return about


def check(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Return what is known of the engine in `folder`, and its plan, which may be deserialised here.

    Raises:
        ExportError: there is none, or the plan is not the one that was built.
        MissingDependency: the library that built it is not installed.
        NotHere: there is no GPU, or the engine is for another GPU or version.
    """
    about = described(folder)
    plan = (folder / PLAN).read_bytes()
    found = hashlib.sha256(plan).hexdigest()
    if found != about["plan"]["sha256"]:
        raise ExportError(
            f"{folder / PLAN}: found sha256 {found[:16]}..., expected"
            f" {about['plan']['sha256'][:16]}...; it was changed after it was built, and is not"
            " opened"
        )
    name, built = about["library"]["name"], about["library"]["version"]
    trt = library(name)
    if not _version_fits(about, trt):
        raise _foreign(folder, f"{name} {trt.__version__}", f"{name} {built}")
    here = gpu()
    if here is None:
        raise NotHere(f"{folder}: found no CUDA device, expected one; engines run on NVIDIA GPUs")
    if not runs_here(about, here):
        raise _foreign(folder, f"{here.name} ({here.compute_capability})", _built_for(about))
    if reason := invalid(trt, plan):
        raise NotHere(
            f"{folder}: {name} says that the engine cannot run on {here.name}"
            f" ({here.compute_capability}): {reason}; run `secateur rebuild {folder}`"
        )
    return about, plan


def runs_here(about: Mapping[str, Any], here: Gpu) -> bool:
    """Return whether an engine is for a GPU, as far as its description says."""
    if about["library"]["name"] == FULL:
        on: Mapping[str, str] = about["built_on"] or {}
        return dict(on) == {"name": here.name, "compute_capability": here.compute_capability}
    asked = [f"{capability:.1f}" for capability in about["settings"]["compute_capabilities"]]
    return not asked or here.compute_capability in asked


def _version_fits(about: Mapping[str, Any], trt: Any) -> bool:
    built = about["library"]["version"]
    if not about["settings"]["version_compatible"]:
        return bool(built == trt.__version__)
    here, then = version(trt), tuple(int(x) for x in built.split(".") if x.isdigit())
    return here[0] == then[0] and here >= then


def _built_for(about: Mapping[str, Any]) -> str:
    if about["library"]["name"] == FULL:
        on = about["built_on"] or {"name": "no GPU", "compute_capability": "none"}
        return f"{on['name']} ({on['compute_capability']})"
    asked = about["settings"]["compute_capabilities"]
    return "compute capability " + (" or ".join(f"{c:.1f}" for c in asked) or "8.0 and later")


def _foreign(folder: Path, found: str, expected: str) -> NotHere:
    return NotHere(
        f"{folder}: found {found}, expected {expected}, which the engine was built for; run"
        f" `secateur rebuild {folder}`"
    )


def open_predictor(folder: Path, *, device: str, threads: int) -> Any:
    """Return a function that runs the engine in `folder`: arrays of inputs to arrays of outputs.

    Raises:
        ExportError, MissingDependency, NotHere: see `check`.
    """
    engine = _open(folder, device, threads)

    def predict(arrays: Arrays) -> dict[str, NDArray[Any]]:
        buffers = engine.put(arrays)
        engine.start()
        return engine.fetch(buffers)

    return predict


def open_resident(folder: Path, *, device: str, threads: int) -> Any:
    """Return a predictor that copies nothing back, see `exporters.without_copies`.

    Raises:
        ExportError, MissingDependency, NotHere: see `check`.
    """
    engine = _open(folder, device, threads)

    def compute(_: Mapping[str, Any]) -> None:
        engine.start()
        engine.wait()

    return without_copies(engine.put, compute)


def invalid(trt: Any, plan: Buffer) -> str:
    """Return why the library says that a plan cannot run here, or nothing.

    TensorRT for RTX alone tells, by the plan's header; its list of GPUs has gaps (9.0).
    """
    runtime = trt.Runtime(logger(trt))
    if not hasattr(runtime, "get_engine_validity"):
        return ""
    validity, reasons = runtime.get_engine_validity(plan)
    if validity != trt.EngineValidity.INVALID:
        return ""
    members = trt.EngineInvalidityDiagnostics.__members__
    return ", ".join(m for m, bit in members.items() if int(reasons) & int(bit)) or "unknown"


def _deserialised(trt: Any, about: Mapping[str, Any], plan: Buffer, where: Path | str) -> Any:
    """Return the engine of a plan whose sha256 was compared, and its runtime: both must live on."""
    log = logger(trt)
    runtime = trt.Runtime(log)
    if about["settings"]["version_compatible"]:
        runtime.engine_host_code_allowed = True  # such a plan brings a runtime along
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ExportError(f"{where}: {trt.__name__} cannot open the engine: {log.errors[:3]}")
    return engine, runtime


def layers(trt: Any, about: Mapping[str, Any], plan: Buffer) -> str:
    """Return what an engine says of its layers, as JSON."""
    engine, _runtime = _deserialised(trt, about, plan, "engine")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _open(folder: Path, device: str, threads: int) -> "_Engine":
    del threads  # the GPU has its own
    if device != "cuda":
        raise NotHere(f"target.device: found {device}, expected cuda; engines run on NVIDIA GPUs")
    about, plan = check(folder)
    return _Engine(library(about["library"]["name"]), about, plan, folder)


class _Engine:
    """An engine that is open, with a stream of its own."""

    def __init__(self, trt: Any, about: Mapping[str, Any], plan: bytes, folder: Path) -> None:
        import torch

        engine, runtime = _deserialised(trt, about, plan, folder)
        self._context = engine.create_execution_context()
        self._held = engine, runtime  # released behind the context, which both must outlive
        self._about, self._folder = about, folder
        self._stream = torch.cuda.Stream()

    def put(self, arrays: Arrays) -> dict[str, Any]:
        """Return inputs and outputs on the device, where the engine is told to find them.

        Raises:
            ValueError: see `refuse_shapes`.
        """
        import torch

        refuse_shapes(self._about, arrays)
        with torch.cuda.stream(self._stream):
            buffers = {
                name: torch.from_numpy(np.ascontiguousarray(arrays[name])).to(
                    "cuda", getattr(torch, given["dtype"])
                )
                for name, given in self._about["inputs"].items()
            }
            for name, buffer in buffers.items():
                self._context.set_input_shape(name, tuple(buffer.shape))
            for name, given in self._about["outputs"].items():
                shape = tuple(self._context.get_tensor_shape(name))
                buffers[name] = torch.empty(
                    shape, dtype=getattr(torch, given["dtype"]), device="cuda"
                )
            for name, buffer in buffers.items():
                self._context.set_tensor_address(name, buffer.data_ptr())
        return buffers

    def start(self) -> None:
        """Have the device compute."""
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError(f"{self._folder}: the engine did not run")

    def wait(self) -> None:
        """Return when the device has computed."""
        self._stream.synchronize()

    def fetch(self, buffers: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Return the outputs, when they are there."""
        import torch

        with torch.cuda.stream(self._stream):
            found = {name: buffers[name].cpu() for name in self._about["outputs"]}
        self.wait()
        return {name: _plain(tensor) for name, tensor in found.items()}


def _plain(tensor: Any) -> NDArray[Any]:
    """Return a tensor as an array; numpy knows no bf16."""
    array: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


def refuse_shapes(about: Mapping[str, Any], arrays: Arrays) -> None:
    """Refuse inputs that the engine's profile does not hold.

    Raises:
        ValueError: an input is missing, or outside.
    """
    for name, limits in about["profile"].items():
        if name not in arrays:
            raise ValueError(f"{name}: found no such input, expected {sorted(about['inputs'])}")
        shape, least, most = arrays[name].shape, limits["min"], limits["max"]
        inside = len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )
        if not inside:
            raise ValueError(
                f"{name}: found the shape {tuple(shape)}, expected one from {tuple(least)} to"
                f" {tuple(most)}, the profile that the engine was built with"
            )
