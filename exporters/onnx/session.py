"""ONNX Runtime: a graph, or the folder that holds one, becomes a function of arrays."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from exporters import ExportError, MissingDependency, NotHere
from exporters.onnx.graph import store
from exporters.onnx.greedy import cache, decoder_inputs

MODEL: Final = Path("onnx", "model.onnx")
"""Where the graph lies in an artifact."""
PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CONFIG: Final[Mapping[str, str]] = {
    "session.intra_op.allow_spinning": "0",
    "session.qdq_matmulnbits_accuracy_level": "0",
}
"""Of every session. Idle threads that wait in a loop would take the cores from whatever runs next,
in a comparison as in a server. And where weights alone are quantized, ONNX Runtime would round the
activations to int8, too, if their graph is of standard operators."""

Arrays = Mapping[str, NDArray[Any]]


def encoder_file(path: Path) -> Path:
    """Return where the encoder of the decoder at `path` lies."""
    return path.with_name("encoder_model.onnx")


def files(path: Path) -> list[Path]:
    """Return the graphs of the model at `path`: its own, or an encoder's and a decoder's."""
    encoder = encoder_file(path)
    return [encoder, path] if encoder.is_file() else [path]


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


def open_predictor(folder: Path, *, device: str, threads: int, optimize: bool = True) -> Any:
    """Return the predictor of an artifact in `folder`: arrays of inputs to arrays of outputs.

    Of an encoder-decoder it gives the logits `(B, L, V)` of all `decoder_input_ids` `(B, L)`.
    """
    *encoders, last = (
        predictor(path, device=device, threads=threads, optimize=optimize)
        for path in files(folder / MODEL)
    )
    if not encoders:
        return last
    return lambda arrays: last(decoder_inputs(encoders[0], arrays))


def predictor(path: Path, *, device: str, threads: int, optimize: bool = True) -> Any:
    """Return a function that runs the graph at `path`.

    A cache that is not given is empty, and positions that are not given are those of the mask.

    Raises:
        ExportError: the file is not a graph that ONNX Runtime opens.
        MissingDependency: onnxruntime is not installed.
        NotHere: the device's execution provider is not there; ONNX Runtime itself would go on with
            the CPU in silence.
    """
    session = open_session(path, device=device, threads=threads, optimize=optimize)
    outputs = [output.name for output in session.get_outputs()]
    given = feeder({node.name: node.shape for node in session.get_inputs()})
    return lambda arrays: dict(zip(outputs, session.run(outputs, given(arrays)), strict=True))


def feeder(inputs: Mapping[str, Sequence[Any]]) -> Callable[[Arrays], dict[str, NDArray[Any]]]:
    """Return what completes a batch to all inputs of a graph, of which the shapes are given.

    A cache that is not in the batch is empty, and positions are those of the mask.
    """

    def given(arrays: Arrays) -> dict[str, NDArray[Any]]:
        fed = {}
        for name, shape in inputs.items():
            if name in arrays:
                fed[name] = arrays[name]
            elif name == "position_ids":
                length = arrays["input_ids"].shape[1]
                fed[name] = positions(arrays["attention_mask"])[:, -length:]
            elif name.startswith("past_key_values."):
                size = len(arrays["input_ids"]), shape[1], 0, shape[3]
                fed[name] = np.zeros(size, np.float32)
        return fed

    return given


def inputs_of(graph: onnx.ModelProto) -> dict[str, list[Any]]:
    """Return the shapes of a graph's inputs, names for what is dynamic."""
    return {
        node.name: [d.dim_value or d.dim_param for d in node.type.tensor_type.shape.dim]
        for node in graph.graph.input
    }


def run_over(
    graph: onnx.ModelProto, batches: Iterable[Arrays], outputs: Sequence[str]
) -> Iterator[list[NDArray[Any]]]:
    """Yield a graph's outputs for every batch, on all cores of the CPU: nothing is timed here."""
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        path = Path(folder, MODEL.name)
        store(graph, path)
        session = open_session(path, device="cpu", threads=0)
        given = feeder(inputs_of(graph))
        for batch in batches:
            yield session.run(outputs, given(batch))


def in_parts(predict: Any, arrays: Arrays, ends: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Return the logits `(B, L, V)` of a decoder that is given its tokens in parts.

    Args:
        predict: a decoder's predictor.
        arrays: `input_ids` `(B, L)`, and what else it takes.
        ends: where a part ends, and the next one goes on with its cache.
    """
    given, logits, seen = dict(arrays), [], 0
    for tokens in np.split(arrays["input_ids"], ends, axis=1):
        seen += tokens.shape[1]
        given["input_ids"] = tokens
        if "attention_mask" in arrays:
            given["attention_mask"] = arrays["attention_mask"][:, :seen]
        outputs = predict(given)
        logits.append(outputs["logits"])
        given |= cache(outputs)
    return {"logits": np.concatenate(logits, axis=1)}


def positions(mask: NDArray[Any]) -> NDArray[Any]:
    """Return the position of every token, the first one that the mask `(B, T)` shows being 0."""
    return np.maximum(np.cumsum(mask, axis=-1) - 1, 0)


def open_session(
    path: Path, *, device: str, threads: int, optimize: bool = True, profile: Path | None = None
) -> Any:
    """Return an ONNX Runtime session; see `predictor` for what it raises.

    Unless it may `optimize`, the graph runs as it is. What it does is written to a file whose name
    begins with `profile`, if that is given.
    """
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for name, value in CONFIG.items():
        options.add_session_config_entry(name, value)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    provider = PROVIDERS[device]
    if device == "cuda":
        ort.preload_dlls()  # those of the wheels that the extra `gpu` brings
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
    raise NotHere(
        f"target.device: found {found[0]}, expected {provider}; install the extra `gpu` and a CUDA"
        " driver, or use device: cpu"
    )
