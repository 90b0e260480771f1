"""ONNX files, run by ONNX Runtime.

The graph is written by `transformers.exporters`, with dynamic batch and sequence, and for ONNX
Runtime fused by the same library into its own operators. Weights over 1 GiB lie beside the graph,
in `model.onnx_data`, the name that servers look for.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from exporters import ExportError, MissingDependency

MODEL: Final = Path("onnx", "model.onnx")
"""Where the graph lies in an artifact."""
DATA: Final = "model.onnx_data"
EXTERNAL_BYTES: Final = 1 << 30
"""From this size on the weights lie in a file of their own; protobuf ends at 2 GiB."""
OPSET: Final = 21
TOLERANCE: Final = 1e-3
"""Largest difference to torch, relative to the largest output, that an fp32 export may have."""

Arrays = Mapping[str, NDArray[Any]]


def _imported() -> ModuleType | None:
    try:
        return import_module("onnxruntime")
    except ImportError:
        return None


# Imported with this module, so that what a process needs for the runtime alone can be told from
# what it needs for a model.
_ORT: Final = _imported()


def runtime() -> ModuleType:
    """Return the module `onnxruntime`.

    Raises:
        MissingDependency: it is not installed, or only the shell of an uninstalled one is left.
    """
    if not hasattr(_ORT, "InferenceSession"):
        raise MissingDependency(
            "onnxruntime: not installed; install one of the two extras, never both:"
            " pip install -e '.[cpu]' for this CPU, or pip install -e '.[gpu]' for CUDA"
        )
    assert _ORT is not None
    return _ORT


def export(
    model: Any,
    samples: Sequence[Arrays],
    *,
    axes: Sequence[str] | Mapping[str, Sequence[str]],
    path: Path,
    fuse_for: Literal["cpu", "cuda"] | None,
) -> float:
    """Write the model to `path` and return its largest relative difference to torch.

    Args:
        model: a `PreTrainedModel` in evaluation mode, in fp32, on the CPU; its configuration is
            told to use no cache.
        samples: batches of inputs; the first is traced, the outputs for the others are compared, so
            they should have other shapes.
        axes: the names of the leading axes of every input, or of each, all dynamic; those of the
            same name have the same size.
        path: the file to write; its folder must be there.
        fuse_for: the execution provider ("cpu", "cuda") whose own operators may be used; None keeps
            to the standard ones.

    Raises:
        ExportError: the outputs differ by more than `TOLERANCE`.
    """
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    # Two rows and eight tokens at least: torch.export takes a size of 1 for a constant.
    traced: dict[str, Any] = {name: torch.from_numpy(a) for name, a in samples[0].items()}
    for module in model.modules():  # an encoder and a decoder have their own
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False
    longest = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    limits = {
        "batch": (1, 1 << 20),
        "sequence": (2, longest),
        "decoder_sequence": (2, longest),
    }
    named = axes if isinstance(axes, Mapping) else dict.fromkeys(traced, axes)
    dimensions = {
        axis: torch.export.Dim(axis, min=lowest, max=highest)
        for axis, (lowest, highest) in limits.items()
    }
    shapes = {
        name: {at: dimensions[axis] for at, axis in enumerate(named[name])} for name in traced
    }
    options = OnnxConfig(
        dynamic=True,
        dynamic_shapes=shapes,
        opset_version=OPSET,
        ort_fusions=fuse_for,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    with quiet():
        program = OnnxExporter().export(model, traced, config=options).program
        rename_axes(program, named)
        save(program, path)
    return verify(model, samples[1:] or samples, path)


def rename_axes(program: Any, axes: Mapping[str, Sequence[str]]) -> None:
    """Give the dynamic axes of the inputs their names; the exporter calls them s18 and s41."""
    names = {
        str(dimension): axis
        for value in program.graph.inputs
        for dimension, axis in zip(value.shape, axes.get(value.name, ()), strict=False)
        if not isinstance(dimension, int)
    }
    import onnx_ir

    for graph in program.graphs():
        values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
        for value in values:
            if value.shape is not None and not value.shape.frozen:
                for at, dimension in enumerate(value.shape):
                    if str(dimension) in names:
                        value.shape[at] = onnx_ir.SymbolicDim(names[str(dimension)])


def save(program: Any, path: Path) -> None:
    """Write the graph, with its weights inside while they are under 1 GiB."""
    import onnx_ir

    size = sum(value.const_value.nbytes for value in program.graph.initializers.values())
    external = DATA if size >= EXTERNAL_BYTES else None
    onnx_ir.save(program, path, external_data=external)


def verify(model: Any, samples: Sequence[Arrays], path: Path) -> float:
    """Return the largest difference to torch over the samples, relative to the largest output.

    Raises:
        ExportError: it is more than `TOLERANCE`, or not a number.
    """
    import torch

    predict = predictor(path, device="cpu", threads=torch.get_num_threads())
    worst = 0.0
    for sample in samples:
        found = predict(sample)
        with torch.inference_mode():
            outputs = model(**{k: torch.from_numpy(np.asarray(v)) for k, v in sample.items()})
        for name, array in found.items():
            expected = outputs[name].numpy()
            scale = max(float(np.abs(expected).max()), 1e-6)
            difference = float(np.abs(array - expected).max()) / scale
            if not difference <= TOLERANCE:
                shapes = {key: value.shape for key, value in sample.items()}
                raise ExportError(
                    f"{path.name}: output {name!r} differs from torch by {difference:.1e} of its"
                    f" largest value at {shapes}, expected at most {TOLERANCE:.0e}"
                )
            worst = max(worst, difference)
    return worst


def open_predictor(folder: Path, *, device: str, threads: int) -> Any:
    """Return the predictor of an artifact in `folder`: arrays of inputs to arrays of outputs."""
    return predictor(folder / MODEL, device=device, threads=threads)


def predictor(path: Path, *, device: str, threads: int) -> Any:
    """Return a function that runs the graph at `path`.

    Raises:
        ExportError: the file is not a graph that ONNX Runtime opens.
        MissingDependency: onnxruntime is not installed.
        RuntimeError: the device's execution provider is not there; ONNX Runtime itself would go on
            with the CPU in silence.
    """
    session = open_session(path, device=device, threads=threads)
    outputs = [output.name for output in session.get_outputs()]
    inputs = {node.name for node in session.get_inputs()}

    def predict(arrays: Arrays) -> dict[str, NDArray[Any]]:
        fed = {name: array for name, array in arrays.items() if name in inputs}
        return dict(zip(outputs, session.run(outputs, fed), strict=True))

    return predict


def open_session(path: Path, *, device: str, threads: int) -> Any:
    """Return an ONNX Runtime session; see `predictor` for what it raises.

    Spinning is off: idle threads that wait in a loop would take the cores from whatever runs next,
    in a comparison as in a server.
    """
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    found = ort.get_available_providers()
    if provider in found:
        try:
            session = ort.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:
            # All of ONNX Runtime's errors derive from Exception alone.
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise ExportError(f"{path}: ONNX Runtime cannot open it: {error}") from error
        found = session.get_providers()
        if found[0] == provider:
            return session
    raise RuntimeError(
        f"target.device: found {found[0]}, expected {provider}; install the extra `gpu` and a CUDA"
        " driver, or use device: cpu"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the exporters of torch and transformers say of themselves at every export."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
