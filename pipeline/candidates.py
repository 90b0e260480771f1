"""What can be timed: a folder or a graph of any origin, what opens it, and what it is asked.

Artifacts of secateur, folders of Hugging Face, graphs of other exporters: the runtime follows from
the files. Inputs are real text in the model's own tokens, the same text for every artifact.
"""

import gzip
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

import numpy as np
from safetensors import safe_open

from benchmarks.data import DataError
from benchmarks.examples import Arrays, collate
from exporters import ExportError, onnx, tensorrt
from exporters.onnx import counting
from pipeline import parts
from pipeline.checkpoint import ModelError, read_config, without_weights
from pipeline.openers import OPENERS

GRAPHS: Final = (onnx.MODEL, Path("model.onnx"))
"""Where a folder holds its graph: as secateur writes it, and as other exporters do."""
GENERATORS: Final = {
    "torch": "pipeline.timed_generation:open_timed",
    "onnxruntime": "exporters.onnx.generation:open_timed",
}

UNCOUNTED: Final = (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError)
"""What counting a torch model raises where it cannot be counted."""


@dataclass(frozen=True)
class Candidate:
    """One artifact.

    `source` is what `opener` opens; `folder` has its configuration and tokenizer; `files` are its
    weights, or its graphs and their weights, or an engine; `graph` is its ONNX file, if it has one.
    """

    name: str
    runtime: str
    opener: str
    source: Path
    folder: Path
    files: tuple[Path, ...]
    graph: Path | None = None

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(path.stat().st_size for path in self.files)


def find(path: Path, device: str) -> Candidate:
    """Return what is at a path.

    Raises:
        ModelError: nothing there can be opened, or nothing says what it takes.
        NotHere, MissingDependency: it is an engine, and for another GPU or version.
    """
    name = path.resolve().name
    places = [path] if path.suffix == ".onnx" else [path / each for each in GRAPHS]
    graph = next((place for place in places if place.is_file()), None)
    weights = tuple(path.glob("*.safetensors"))
    plan = path / tensorrt.PLAN
    if plan.is_file() and (device == "cuda" or graph is None):
        tensorrt.check(path)
        return Candidate(name, "tensorrt", OPENERS["tensorrt"], path, path, (plan,))
    if graph is not None:
        ours = graph == path / onnx.MODEL
        opener = OPENERS["onnxruntime"] if ours else "exporters.onnx:predictor"
        source = path if ours else graph
        folder = _described(graph.parent)
        return Candidate(name, "onnxruntime", opener, source, folder, _files(graph), graph)
    if weights and (path / "config.json").is_file():
        return Candidate(name, "torch", OPENERS["torch"], path, path, weights)
    raise ModelError(
        f"{path}: found no artifact, expected a folder with {onnx.MODEL}, {GRAPHS[1]},"
        f" {tensorrt.PLAN}, or config.json and safetensors, or a file .onnx"
    )


def _described(folder: Path) -> Path:
    """Return the folder whose config.json and tokenizer describe the model of a graph."""
    for place in (folder, folder.parent):
        if (place / "config.json").is_file():
            return place
    raise ModelError(
        f"{folder}: found no config.json, expected one, and the tokenizer, beside the graph"
    )


def _files(graph: Path) -> tuple[Path, ...]:
    """Return the graphs of a model, and the files of their weights."""
    graphs = onnx.files(graph)
    data = [p for each in graphs for p in each.parent.glob(f"{each.name}[_.]data*")]
    return *graphs, *data


def generator(path: Path, device: str) -> Candidate:
    """Return what is at a path, opened by what generates with it.

    Raises:
        ModelError: nothing there can be opened, or does not generate.
        NotHere, MissingDependency: see `find`.
    """
    found = find(path, device)
    ours = found.graph in {None, path / onnx.MODEL}
    if found.runtime not in GENERATORS or not ours:
        raise ModelError(
            f"{path}: found a graph that secateur did not write, or an engine, expected an ONNX"
            " artifact of its own, or a torch model"
        )
    if not without_weights(found.folder).can_generate():
        raise ModelError(f"{path}: found a model that does not generate, expected one that does")
    return replace(found, opener=GENERATORS[found.runtime])


def parameters(candidate: Candidate) -> int | None:
    """Return the number of weights, None of a graph, which may pack several into one number."""
    if candidate.runtime != "torch":
        return None
    count = 0
    for path in candidate.files:
        with safe_open(path, "numpy") as file:
            count += sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return count


def texts(path: Path | None) -> list[str]:
    """Return the lines of a text file (`.gz` too), or the prose that comes with Python.

    Raises:
        DataError: there is no text in it.
    """
    if path is None:
        return [topics[name] for name in sorted(topics)]
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"--text: {path}: cannot be read: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"--text: {path}: found no text, expected a line for each")
    return lines


def inputs(candidate: Candidate, lines: Sequence[str], batch: int, sequence: int) -> Arrays:
    """Return `batch` rows of `sequence` tokens, no padding among them; or images.

    What a decoder reads beside an encoder is a sixteenth as long.

    Raises:
        ModelError: there is no tokenizer, or the model has fewer positions.
    """
    folder = candidate.folder
    config = read_config(folder)
    if hasattr(config, "image_size"):
        return _images(config, batch)
    places = getattr(config, "max_position_embeddings", None) or sequence
    if sequence > places:
        raise ModelError(f"--sequence: {folder}: found {sequence}, expected at most {places}")
    from pipeline import sources

    tokenizer = sources.processor(str(folder), "AutoTokenizer", None)
    tokens = np.fromiter(_tokens(tokenizer, lines, batch * sequence), np.int64)
    rows = np.resize(tokens, (batch, sequence))
    found = {name: np.zeros_like(rows) for name in tokenizer.model_input_names}
    found |= {"input_ids": rows, "attention_mask": np.ones_like(rows)}
    if config.is_encoder_decoder:
        found["decoder_input_ids"] = rows[:, : max(sequence // 16, 1)]
    return found


def _tokens(tokenizer: Any, lines: Sequence[str], enough: int) -> Iterable[int]:
    """Yield the tokens of one text after the other."""
    count = 0
    for line in lines:
        ids = tokenizer(line, truncation=False, verbose=False)["input_ids"]
        count += len(ids)
        yield from ids
        if count >= enough:
            return


def _images(config: Any, batch: int) -> Arrays:
    """Return noise of the model's size: what a convolution costs is not a matter of its values."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    noise = np.random.default_rng(0).standard_normal((config.num_channels, height, width))
    return collate([{"pixel_values": noise.astype(np.float32)}] * batch, {})


def multiply_adds(
    candidate: Candidate, given: Arrays, device: str
) -> tuple[dict[str, int] | None, str]:
    """Return those of one call by precision, or None and why they are not known."""
    if device != "cpu" and candidate.graph is not None:
        return None, f"graphs are counted as the CPU fuses them, not as {device} does"
    if "decoder_input_ids" in given:
        return None, "not counted for an encoder and its decoder"
    if candidate.graph is None and candidate.runtime != "torch":
        return None, f"not counted in {candidate.runtime}"
    try:
        if candidate.graph is not None:
            return counting.multiply_adds(candidate.graph, given), ""
        return _of_modules(candidate.folder, given), ""
    except (ExportError, *UNCOUNTED) as error:
        return None, str(error)


def _of_modules(folder: Path, given: Arrays) -> dict[str, int]:
    from pipeline import counting as modules

    model = without_weights(folder)
    rows, length = next(iter(given.values())).shape[:2]
    dtype = str(getattr(model.config, "dtype", None) or "float32").removeprefix("torch.")
    precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(dtype, dtype)
    return {precision: int(modules.total(model, length)) * rows}


def bytes_read(candidate: Candidate) -> int:
    """Return the bytes of the weights that every call reads: no tables that are looked up in."""
    if candidate.graph is not None:
        return sum(counting.bytes_read(path) for path in onnx.files(candidate.graph))
    model = without_weights(candidate.folder)
    known, words = parts.places(model), model.get_input_embeddings()
    if model.get_output_embeddings() is not None and model.config.tie_word_embeddings:
        # Read as the head, whole.
        known = {name: p for name, p in known.items() if model.get_submodule(name) is not words}
    found = parts.bytes_of_tensors(candidate.files, known)
    return sum(found.values()) - found["embeddings"]
