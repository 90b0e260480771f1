"""ONNX graphs in fewer bits, by the libraries that do it.

A method takes a graph and gives a graph. It counts what it changed: several library paths quantize
nothing and say nothing. Nodes whose weights are constants are named after their modules (see
`exporters.onnx.graph`), so that those to leave alone can be named.
"""

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import ModelProto

from exporters.onnx.graph import EXTERNAL_BYTES, MATRIX, PLACES, store
from exporters.onnx.session import Arrays, feeder, inputs_of, runtime
from pipeline import migration, weight_only
from pipeline.products import straighten

INTEGER: Final = frozenset({"MatMulInteger", "DynamicQuantizeMatMul", "QGemm", "QLinearMatMul"})
"""The operators that multiply integers."""
BLOCKED: Final = frozenset({"MatMulNBits", "GatherBlockQuantized"})
"""The operators that read weights in blocks."""
KEPT_FP32: Final = (
    "LayerNormalization",
    "SkipLayerNormalization",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "RMSNormalization",
    "Softmax",
    "ReduceMean",
    "Pow",
    "Sqrt",
    "Reciprocal",
)
"""What computes norms and softmax, in fp32 whatever the rest is in."""


NOTHING: Final = (
    "{}: found no matrix product with constant weights that could be quantized, expected at least"
    " one; nothing was quantized"
)


class QuantizationError(RuntimeError):
    """Nothing was quantized, or the calibration data do not do."""


@dataclass(frozen=True)
class Options:
    """What a method is told; each looks at what concerns it.

    `reduce_range`: 7-bit weights, for CPUs whose 8-bit products overflow 16 bits. `portable`:
    standard operators alone. `left`: names of nodes that stay as they are. `calibration`: gives
    batches of inputs, anew each time.
    """

    embeddings: bool = False
    reduce_range: bool = False
    portable: bool = False
    migration: float = 0.0
    algorithm: str = "rtn"
    block_size: int = 32
    symmetric: bool = True
    left: frozenset[str] = frozenset()
    calibration: Callable[[], Iterator[Arrays]] = field(default=lambda: iter(()))


def int8_dynamic(graph: ModelProto, target: Path, options: Options) -> int:
    """Write the graph with int8 weights, activations quantized as they come.

    Weights are symmetric, one scale a column; embedding tables have one scale and are dequantized
    after the look-up. By onnxruntime.quantization,
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

    Returns:
        The number of matrix products that run on integers.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if options.migration:
        migration.migrate(graph, options.migration, options.calibration, options.left)
    with _stored(graph) as source, quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=_operators(options),
            per_channel=True,
            reduce_range=options.reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(options.left),
            use_external_data_format=graph.ByteSize() >= EXTERNAL_BYTES,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    return _count(target, lambda node, _: node.op_type in INTEGER)


def int8_static(graph: ModelProto, target: Path, options: Options) -> int:
    """Write the graph with int8 weights and activations, whose ranges are those of the calibration.

    Weights are symmetric, one scale a column. Activations are unsigned with a zero point, or
    signed and symmetric if `portable`, as TensorRT has them. Products of two activations stay in
    fp32. The data are gone through batch by batch, of which the ranges alone are kept.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    if options.migration:
        migration.migrate(graph, options.migration, options.calibration, options.left)
    given = feeder(inputs_of(graph))

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = options.calibration()

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else given(batch)

    with _stored(graph) as source, quiet():
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_operators(options),
            per_channel=True,
            reduce_range=options.reduce_range,
            activation_type=QuantType.QInt8 if options.portable else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(options.left | _of_activations(graph)),
            use_external_data_format=graph.ByteSize() >= EXTERNAL_BYTES,
            extra_options={
                "ActivationSymmetric": options.portable,
                "WeightSymmetric": True,
                # A pair behind a product costs accuracy, and no kernel wants it.
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                "QuantizeBias": False,
                "DefaultTensorType": onnx.TensorProto.FLOAT,
            },
        )
    return _count(target, lambda node, q: node.op_type in {"MatMul", "Gemm"} and node.input[1] in q)


def int8_weights(graph: ModelProto, target: Path, options: Options) -> int:
    """Write the graph with int8 weights, which are dequantized where they are multiplied."""
    if options.portable:
        count = weight_only.dequantized(graph, options.left, embeddings=options.embeddings)
        store(graph, target)
        return count
    with quiet():
        graph = weight_only.blockwise(
            graph,
            8,
            "rtn",
            options.block_size,
            options.left,
            symmetric=options.symmetric,
            embeddings=options.embeddings,
        )
    store(graph, target)
    return _count(target, lambda node, _: node.op_type in BLOCKED)


def int4_weights(graph: ModelProto, target: Path, options: Options) -> int:
    """Write the graph with int4 weights in blocks, each of which has a scale."""
    with quiet():
        graph = weight_only.blockwise(
            graph,
            4,
            options.algorithm,
            options.block_size,
            options.left,
            symmetric=options.symmetric,
            embeddings=options.embeddings,
            portable=options.portable,
            calibration=options.calibration,
        )
    store(graph, target)
    if options.portable:
        return _count(target, lambda node, q: node.op_type == "MatMul" and node.input[1] in q)
    return _count(target, lambda node, _: node.op_type in BLOCKED)


def fp16(graph: ModelProto, target: Path, options: Options) -> int:
    """Write the graph in fp16, but for norms and softmax; inputs and outputs stay as they were."""
    from onnxruntime.transformers.float16 import (
        DEFAULT_OP_BLOCK_LIST,
        convert_float_to_float16,
    )

    with quiet():
        converted = convert_float_to_float16(
            graph,
            keep_io_types=True,
            disable_shape_infer=False,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *KEPT_FP32],
            node_block_list=sorted(options.left),
        )
    # The library casts an input that a node takes twice twice, under one name.
    nodes = {(node.name, *node.output): node for node in converted.graph.node}
    once = list(nodes.values())
    del converted.graph.node[:]
    converted.graph.node.extend(once)
    store(converted, target)
    half = {x.name for x in converted.graph.initializer if x.data_type == onnx.TensorProto.FLOAT16}
    return _count(target, lambda node, _: any(name in half for name in node.input))


@dataclass(frozen=True)
class Method:
    """A method: what it does, and the options that concern it.

    `calibrated`: it needs data. `standard`: it takes graphs of standard operators alone.
    """

    quantize: Callable[[ModelProto, Path, Options], int]
    options: frozenset[str]
    calibrated: bool = False
    standard: bool = False


METHODS: Final[Mapping[str, Method]] = {
    "fp16": Method(fp16, frozenset(), standard=True),
    "int4-weights": Method(
        int4_weights,
        frozenset({"embeddings", "portable", "algorithm", "block_size", "symmetric"}),
    ),
    "int8-dynamic": Method(int8_dynamic, frozenset({"embeddings", "migration"})),
    "int8-static": Method(
        int8_static, frozenset({"embeddings", "portable", "migration"}), calibrated=True
    ),
    "int8-weights": Method(
        int8_weights, frozenset({"embeddings", "portable", "block_size", "symmetric"})
    ),
}


def quantize(source: Path, target: Path, method: str, options: Options) -> int:
    """Write the graph at `source` to `target` in fewer bits, and return how many nodes changed.

    Raises:
        MissingDependency: onnxruntime is not installed.
        QuantizationError: no node was changed.
    """
    runtime()
    graph = onnx.load(source)
    if not any(name not in options.left for nodes in layers(source).values() for name in nodes):
        raise QuantizationError(NOTHING.format(method))
    if method != "fp16":
        del graph.graph.value_info[:]  # the exporter's shapes go stale when weights are transposed
        straighten(graph, options.left, tied=options.embeddings)
    count = METHODS[method].quantize(graph, target, options)
    if not count:
        raise QuantizationError(NOTHING.format(method))
    return count


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the quantizers of onnxruntime say of every node."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _operators(options: Options) -> Sequence[str]:
    return ["MatMul", "Gemm", *(["Gather"] if options.embeddings else [])]


def _of_activations(graph: ModelProto) -> set[str]:
    """Return the names of the products whose factors are both activations."""
    constants = {initializer.name for initializer in graph.graph.initializer}
    return {
        node.name
        for node in graph.graph.node
        if node.op_type in {"MatMul", "Gemm"} and node.input[1] not in constants
    }


def layers(path: Path) -> dict[str, list[str]]:
    """Return the nodes of a graph that read constant matrices, by the layer that they lie in.

    A layer is a numbered module; what lies in none is a layer of its own.
    """
    graph = onnx.load(path, load_external_data=False).graph
    constants = {x.name for x in graph.initializer if len(x.dims) == MATRIX}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in constants:
            constants.add(node.output[0])
    found: dict[str, list[str]] = {}
    for node in graph.node:
        place = PLACES.get(node.op_type)
        if place is not None and node.input[place] in constants:
            numbered = re.match(r".*?\.\d+(?=\.)", node.name)
            found.setdefault(numbered[0] if numbered else node.name, []).append(node.name)
    return found


@contextmanager
def _stored(graph: ModelProto) -> Iterator[Path]:
    """Give the graph as a file, for libraries that take nothing else."""
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        path = Path(folder, "model.onnx")
        store(graph, path)
        yield path


def _count(path: Path, changed: Callable[[Any, frozenset[str]], bool]) -> int:
    """Return how many nodes changed; they are told the names of what was dequantized."""
    graph = onnx.load(path, load_external_data=False).graph
    dequantized = frozenset(
        name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output
    )
    return sum(changed(node, dequantized) for node in graph.node)
