"""ONNX graphs in fewer bits, by the libraries that do it.

A method takes a graph and writes a file. What that changed is counted: several library paths
quantize nothing and say nothing. Nodes that read constant matrices are named after their modules
(see `exporters.onnx.graph`), so that those to leave alone can be named.
"""

import copy
import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from exporters.onnx.graph import EXTERNAL_BYTES, quiet, store
from exporters.onnx.greedy import decoder_inputs
from exporters.onnx.session import (
    Arrays,
    feeder,
    files,
    inputs_of,
    predictor,
    runtime,
)
from pipeline import migration, weight_only
from pipeline.products import replace, straighten, weights

KEPT_FP32: Final = (
    "LayerNormalization",
    "RMSNormalization",
    "Softmax",
    "ReduceMean",
    "Pow",
    "Sqrt",
    "Reciprocal",
)
"""What computes norms and softmax, in fp32 whatever the rest is in."""
BF16_LARGEST: Final = (2 - 2.0**-7) * 2.0**127


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


def int8_dynamic(graph: ModelProto, target: Path, options: Options) -> None:
    """Write the graph with int8 weights, activations quantized as they come.

    Weights are symmetric, one scale a column; embedding tables have one scale and are dequantized
    after the look-up. By onnxruntime.quantization,
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if options.migration:
        migration.migrate(graph, options.migration, options.calibration, options.left)
    large = graph.ByteSize() >= EXTERNAL_BYTES
    with _stored(graph) as source, quiet():
        written = source.with_name("quantized.onnx")
        quantize_dynamic(
            source,
            written,
            op_types_to_quantize=_operators(options),
            per_channel=True,
            reduce_range=options.reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(options.left),
            use_external_data_format=large,
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
        store(onnx.load(written), target)  # the library has another name for weights beside a graph


def int8_static(graph: ModelProto, target: Path, options: Options) -> None:
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

    large = graph.ByteSize() >= EXTERNAL_BYTES
    with _stored(graph) as source, quiet():
        written = source.with_name("quantized.onnx")
        quantize_static(
            source,
            written,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_operators(options),
            per_channel=True,
            reduce_range=options.reduce_range,
            activation_type=QuantType.QInt8 if options.portable else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(options.left | _of_activations(graph) | _of_positions(graph)),
            use_external_data_format=large,
            extra_options={
                "ActivationSymmetric": options.portable,
                "WeightSymmetric": True,
                # A pair behind a product costs accuracy, and no kernel wants it.
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
                "QuantizeBias": False,
                "DefaultTensorType": TensorProto.FLOAT,
            },
        )
        store(onnx.load(written), target)


def fewer_bits(graph: ModelProto, target: Path, options: Options, *, bits: int) -> None:
    """Write the graph with weights of 4 or 8 bits, activations as they were.

    In blocks, each of which has a scale; or, portable in 8 bits, with a scale a column.
    """
    if options.portable and bits == 8:  # noqa: PLR2004
        weight_only.dequantized(graph, options.left, embeddings=options.embeddings)
    else:
        with quiet():
            graph = weight_only.blockwise(
                graph,
                bits,
                options.algorithm,
                options.block_size,
                options.left,
                symmetric=options.symmetric,
                embeddings=options.embeddings,
                portable=options.portable,
                calibration=options.calibration,
            )
    store(graph, target)


def fp16(graph: ModelProto, target: Path, options: Options) -> None:
    """Write the graph in fp16, but for norms and softmax; inputs and outputs stay as they were."""
    store(_halved(graph, options), target)


def bf16(graph: ModelProto, target: Path, options: Options) -> None:
    """Write the graph in bf16, but for norms and softmax; inputs and outputs stay as they were.

    What is bf16 is what would be fp16, but made of the fp32 weights: fp16 has not their range.
    """
    wide = {name: copy.deepcopy(tensor) for name, tensor in _tensors(graph).items()}
    halved = _halved(graph, options)
    for name, tensor in _tensors(halved).items():
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(_rounded(wide.get(name, tensor), tensor.name))
    for node in halved.graph.node:
        for attribute in node.attribute:
            if attribute.name in {"to", "dtype"} and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
    store(halved, target)


def _tensors(graph: ModelProto) -> dict[str, TensorProto]:
    """Return what is constant in a graph, by the name of the value that it gives."""
    found = {initializer.name: initializer for initializer in graph.graph.initializer}
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                found[node.output[0]] = attribute.t
    return found


def _rounded(tensor: TensorProto, name: str) -> TensorProto:
    """Return a tensor in bf16; what is beyond its range becomes its largest number."""
    kind = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    array = numpy_helper.to_array(tensor).astype(np.float32).clip(-BF16_LARGEST, BF16_LARGEST)
    return numpy_helper.from_array(array.astype(kind), name)


def _halved(graph: ModelProto, options: Options) -> ModelProto:
    """Return the graph in fp16, but for norms and softmax."""
    from onnxruntime.transformers.float16 import (
        DEFAULT_OP_BLOCK_LIST,
        convert_float_to_float16,
    )
    from onnxruntime.transformers.onnx_model import OnnxModel

    means = {n for node in graph.graph.node if node.op_type == "ReduceMean" for n in node.output}
    # What is added to a mean square is too small for fp16, and the mean may be too large.
    norms = {node.name for node in graph.graph.node if means & set(node.input)}
    with quiet():
        converted = convert_float_to_float16(
            graph,
            keep_io_types=True,
            disable_shape_infer=False,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *KEPT_FP32],
            node_block_list=sorted(options.left | norms),
        )
    # The library casts an input that a node takes twice twice, under one name.
    nodes = {(node.name, *node.output): node for node in converted.graph.node}
    once = list(nodes.values())
    del converted.graph.node[:]
    converted.graph.node.extend(once)
    OnnxModel(converted).topological_sort()  # the library puts its casts last
    _keep_wide(converted.graph.node)
    replace(converted, list(converted.graph.node))
    del converted.graph.value_info[:]  # not all of it is true any more
    return converted


@dataclass(frozen=True)
class Method:
    """A method: what it does, and the options that concern it.

    `calibrated`: it needs data. `integer`: products are those of 8-bit integers, which may
    overflow. `whole`: it changes all of a graph, embedding tables too, which may have standard
    operators alone. `on_cpu`: ONNX Runtime runs what it writes on the CPU.
    """

    quantize: Callable[[ModelProto, Path, Options], None]
    options: frozenset[str]
    calibrated: bool = False
    integer: bool = False
    whole: bool = False
    on_cpu: bool = True


METHODS: Final[Mapping[str, Method]] = {
    "bf16": Method(bf16, frozenset(), whole=True, on_cpu=False),
    "fp16": Method(fp16, frozenset(), whole=True),
    "int4-weights": Method(
        partial(fewer_bits, bits=4),
        frozenset({"embeddings", "portable", "algorithm", "block_size", "symmetric"}),
    ),
    "int8-dynamic": Method(int8_dynamic, frozenset({"embeddings", "migration"}), integer=True),
    "int8-static": Method(
        int8_static,
        frozenset({"embeddings", "portable", "migration"}),
        calibrated=True,
        integer=True,
    ),
    "int8-weights": Method(
        partial(fewer_bits, bits=8),
        frozenset({"embeddings", "portable", "block_size", "symmetric"}),
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
    if not METHODS[method].whole:
        del graph.graph.value_info[:]  # the exporter's shapes go stale when weights are transposed
        straighten(graph, options.left, tied=options.embeddings)
    before, after = len(_nodes(graph, method, options)), 0
    if before:
        METHODS[method].quantize(graph, target, options)
        after = len(_nodes(onnx.load(target, load_external_data=False), method, options))
    if before == after:
        raise QuantizationError(
            f"{method}: found no matrix product with constant weights that could be quantized,"
            " expected at least one; nothing was quantized"
        )
    return before - after


def quantize_all(source: Path, target: Path, method: str, options: Options) -> int:
    """Write the graphs of the model at `source` beside `target`, and return how many nodes changed.

    A decoder beside an encoder is calibrated on what that gives in full precision.

    Raises:
        MissingDependency: onnxruntime is not installed.
        QuantizationError: in one of the graphs no node was changed.
    """
    changed = 0
    *encoders, last = files(source)
    for path in encoders:
        changed += quantize(path, target.with_name(path.name), method, options)
        batches = partial(_decoder_batches, path, options.calibration)
        options = dataclasses.replace(options, calibration=batches)
    return changed + quantize(last, target, method, options)


def _decoder_batches(encoder: Path, batches: Callable[[], Iterator[Arrays]]) -> Iterator[Arrays]:
    """Yield what a decoder takes for the batches, on all cores: nothing is timed here."""
    encode = predictor(encoder, device="cpu", threads=0)
    for batch in batches():
        yield decoder_inputs(encode, batch)


def _keep_wide(nodes: Sequence[NodeProto]) -> None:
    """Let what is computed in fp32 and read in fp32 not go through fp16 in between, in place."""
    cast = {n.output[0]: (n.input[0], n.attribute[0].i) for n in nodes if n.op_type == "Cast"}
    for node in nodes:
        for at, name in enumerate(node.input):
            before, to = cast.get(name, ("", 0))
            wide, through = cast.get(before, ("", 0))
            if (through, to) == (TensorProto.FLOAT16, TensorProto.FLOAT):
                node.input[at] = wide


def _operators(options: Options) -> Sequence[str]:
    return ["MatMul", *(["Gather"] if options.embeddings else [])]


def _of_activations(graph: ModelProto) -> set[str]:
    """Return the names of the products whose factors are both activations."""
    constants = {initializer.name for initializer in graph.graph.initializer}
    return {
        node.name
        for node in graph.graph.node
        if node.op_type == "MatMul" and node.input[1] not in constants
    }


def _of_positions(graph: ModelProto) -> set[str]:
    """Return the names of the look-ups of what relative positions add to scores, as in T5.

    These tables are small. And ONNX Runtime (1.31) moves a signed pair behind such a look-up across
    the transposition that follows, gives it two types, and does not open the graph.
    """
    turned = {node.input[0] for node in graph.graph.node if node.op_type == "Transpose"}
    return {n.name for n in graph.graph.node if n.op_type == "Gather" and n.output[0] in turned}


def layers(path: Path, method: str, options: Options) -> dict[str, list[str]]:
    """Return the nodes of a graph that a method changes, by the layer that they lie in.

    A layer is a numbered module; what lies in none is a layer of its own.
    """
    graph = onnx.load(path)
    straighten(graph, options.left, tied=options.embeddings)
    found: dict[str, list[str]] = {}
    for name in _nodes(graph, method, options):
        numbered = re.match(r".*?\.\d+(?=\.)", name)
        found.setdefault(numbered[0] if numbered else name, []).append(name)
    return found


def _nodes(graph: ModelProto, method: str, options: Options) -> list[str]:
    """Return the names of the nodes that read what a method changes, and still is in fp32."""
    tables = options.embeddings or METHODS[method].whole
    read = weights(graph, options.left)
    return [node.name for node, _, _ in read if tables or node.op_type != "Gather"]


@contextmanager
def _stored(graph: ModelProto) -> Iterator[Path]:
    """Give the graph as a file, for libraries that take nothing else."""
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        path = Path(folder, "model.onnx")
        store(graph, path)
        yield path
