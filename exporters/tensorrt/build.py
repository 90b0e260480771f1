"""An ONNX file becomes an engine: profile, limits, progress, and what came of it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import onnx

from exporters import ExportError, NotHere
from exporters.onnx.graph import data_file
from exporters.onnx.session import inputs_of
from exporters.tensorrt import precisions
from exporters.tensorrt.engine import (
    ENGINE,
    PLAN,
    SCHEMA,
    described,
    invalid,
    layers,
    runs_here,
)
from exporters.tensorrt.library import FULL, RTX, Gpu, gpu, library, logger
from exporters.tensorrt.progress import Track, built, silent

Shapes = Mapping[str, Mapping[str, list[int]]]
"""Input -> `min`, `opt`, `max` -> its shape."""

UNOPENED: Final = "the engine cannot be opened on the machine that built it"
"""Why the precisions of an engine's layers are not known."""
RECORDED: Final = ("workspace_bytes", "version_compatible", "compute_capabilities")
"""The settings with which an engine is made again: none of them names a file."""
MESSAGES: Final = 3
"""So many of a library's errors are shown; the first ones say what is wrong."""


@dataclass(frozen=True)
class Settings:
    """How an engine is built.

    `workspace_bytes`: the most device memory that a layer may use beside its tensors.
    `timing_cache`: a file with the times of kernels, read if it is there and written. TensorRT
    alone has one. `version_compatible`: the engine runs with later versions of TensorRT, too, of
    the same major one. `compute_capabilities`: the GPUs that TensorRT for RTX builds for; all that
    it supports by default, if none are named. `library`: `tensorrt` or `tensorrt_rtx`; the one that
    has what is asked for, if none is named, of both TensorRT where there is a GPU.
    """

    workspace_bytes: int | None = None
    timing_cache: str | None = None
    version_compatible: bool = False
    compute_capabilities: tuple[float, ...] = ()
    library: str | None = None


def available(settings: Settings) -> ModuleType:
    """Return the library that can build on this machine what the settings ask for.

    Raises:
        MissingDependency: it is not installed.
        NotHere: there is no GPU, and TensorRT is asked for; or TensorRT for RTX cannot build for a
            GPU that is named.
    """
    here = gpu()
    name = settings.library or _chosen(settings, here)
    if name == FULL and here is None:
        raise NotHere(
            "tensorrt: found no CUDA device, expected one: TensorRT builds on the GPU that will run"
            " the engine. TensorRT for RTX builds without, but has no version_compatible and no"
            " timing_cache"
        )
    trt = library(name)
    if settings.compute_capabilities:
        members = [m for m in trt.ComputeCapability.__members__ if m.startswith("SM")]
        unknown = [f"{c:.1f}" for c in settings.compute_capabilities if _member(c) not in members]
        if unknown:
            known = ", ".join(f"{member[2:-1]}.{member[-1]}" for member in members)
            raise NotHere(
                f"compute_capabilities: found {', '.join(unknown)}, expected some of {known}, those"
                f" of TensorRT for RTX {trt.__version__}"
            )
    return trt


def _chosen(settings: Settings, here: Gpu | None) -> str:
    if settings.compute_capabilities:
        return RTX
    if settings.version_compatible or settings.timing_cache:
        return FULL
    return FULL if here is not None and find_spec(FULL) is not None else RTX


def profile(path: Path, axes: Mapping[str, tuple[int, int, int]]) -> Shapes:
    """Return the shapes of all inputs of the graph at `path`.

    Args:
        path: a graph.
        axes: least, most usual and largest size of every dynamic axis.

    Raises:
        ExportError: an input has another dynamic axis.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for name, shape in inputs_of(onnx.load(path, load_external_data=False)).items():
        others = [str(axis) for axis in shape if isinstance(axis, str) and axis not in axes]
        if others:
            raise ExportError(
                f"{path.name}: found the dynamic axis {others[0]!r} of the input {name!r}, expected"
                f" none but {sorted(axes)}; a graph with a cache cannot be an engine here"
            )
        found[name] = {
            which: [size if isinstance(size, int) else axes[size][at] for size in shape]
            for at, which in enumerate(("min", "opt", "max"))
        }
    return found


def build(
    path: Path, folder: Path, shapes: Shapes, settings: Settings, track: Track = silent
) -> dict[str, Any]:
    """Build the engine of the graph at `path`, and return what `ENGINE` then says of it.

    Writes `PLAN` and `ENGINE` below `folder`. If the GPU is here, the engine is opened and the
    precisions of its layers are read back.

    Args:
        path: an ONNX file of standard operators; its weights may lie beside it.
        folder: the artifact's folder.
        shapes: the profile; no other shapes can be run.
        settings: see `Settings`.
        track: shows how far the build is.

    Raises:
        ExportError: the graph is refused, cannot be built, or has other precisions as an engine
            than it has itself.
        MissingDependency: the library is not installed.
        NotHere: see `available`.
    """
    trt = available(settings)
    log = logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, log, path)
    config = _configure(trt, builder, shapes, settings)
    cache = _timing_cache(config, settings.timing_cache)
    if settings.timing_cache and not Path(settings.timing_cache).absolute().parent.is_dir():
        raise ExportError(
            f"timing_cache: found no folder {Path(settings.timing_cache).absolute().parent},"
            " expected it"
        )
    plan = built(trt, builder, network, config, track)
    if plan is None:
        raise ExportError(f"{path.name}: {trt.__name__} cannot build an engine: {_said(log)}")
    (folder / PLAN).parent.mkdir(parents=True, exist_ok=True)
    (folder / PLAN).write_bytes(memoryview(plan))
    if cache is not None and settings.timing_cache:
        _write_whole(Path(settings.timing_cache), bytes(memoryview(cache.serialize())))
    here = gpu()
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "library": {"name": trt.__name__, "version": trt.__version__},
        "plan": {
            "bytes": plan.nbytes,
            "sha256": hashlib.sha256(memoryview(plan)).hexdigest(),
        },
        "onnx": {file.name: _hash(file) for file in (path, data_file(path)) if file.is_file()},
        "inputs": _tensors(network.get_input, network.num_inputs),
        "outputs": _tensors(network.get_output, network.num_outputs),
        "profile": {name: dict(limits) for name, limits in shapes.items()},
        "built_on": asdict(here) if here else None,
        "settings": {name: getattr(settings, name) for name in RECORDED},
        "precisions": {"asked": precisions.asked(path), "found": None, "unread": UNOPENED},
    }
    if here is not None and runs_here(about, here) and not invalid(trt, memoryview(plan)):
        about["precisions"] |= _audited(trt, about, memoryview(plan))
    (folder / ENGINE).write_text(json.dumps(about, indent=1, sort_keys=True), encoding="utf-8")
    return described(folder)


def _parse(trt: Any, network: Any, log: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(path)):
        return
    errors = [parser.get_error(at) for at in range(parser.num_errors)]
    said = "; ".join(
        f"{e.node_operator() or 'a constant'} {e.node_name()}: {' '.join(e.desc().split())}"
        for e in errors[:MESSAGES]
    )
    raise ExportError(
        f"{path.name}: {trt.__name__} refuses the graph: {said or _said(log)}; it reads standard"
        " operators, symmetric Q/DQ pairs and casts"
    )


def _configure(trt: Any, builder: Any, shapes: Shapes, settings: Settings) -> Any:
    """Return the builder's configuration."""
    config = builder.create_builder_config()
    limits = builder.create_optimization_profile()
    for name, shape in shapes.items():
        limits.set_shape(name, shape["min"], shape["opt"], shape["max"])
    config.add_optimization_profile(limits)
    # Without it the engine does not tell its layers' types.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.compute_capabilities:
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for at, capability in enumerate(settings.compute_capabilities):
            kind = getattr(trt.ComputeCapability, _member(capability))
            config.set_compute_capability(kind, at)
    return config


def _timing_cache(config: Any, path: str | None) -> Any:
    """Return the timing cache that the builder now uses, if there is to be one."""
    if path is None:
        return None
    before = Path(path).read_bytes() if Path(path).is_file() else b""
    cache = config.create_timing_cache(before)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise ExportError(
            f"{path}: a timing cache of another GPU or version; remove it, and it is made anew"
        )
    return cache


def _audited(trt: Any, about: Mapping[str, Any], plan: memoryview) -> dict[str, Any]:
    """Return the precisions `found` of the engine's layers, which are those of the graph.

    TensorRT for RTX compiles its kernels when an engine first runs; if it tells no types before
    that, there are none to compare.
    """
    text = layers(trt, about, plan)
    found = precisions.found(text)
    if not found and trt.__name__ == RTX:
        return {"unread": "TensorRT for RTX tells no types of the layers before they ran"}
    precisions.audit(about["precisions"]["asked"], text)
    return {"found": found, "unread": None}


def _tensors(get: Callable[[int], Any], count: int) -> dict[str, Any]:
    tensors = [get(at) for at in range(count)]
    return {t.name: {"dtype": _torch_name(t.dtype), "shape": list(t.shape)} for t in tensors}


def _torch_name(dtype: Any) -> str:
    """Return the name that torch has for a type."""
    names = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
    return names.get(dtype.name, dtype.name.lower())


def _member(capability: float) -> str:
    """Return what TensorRT for RTX calls a compute capability."""
    return f"SM{capability:.1f}".replace(".", "")


def _hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _said(log: Any) -> str:
    return "; ".join(log.errors[:MESSAGES]) or "it does not say why"


def _write_whole(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)
