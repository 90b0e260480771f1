"""What a graph does as ONNX Runtime computes it: multiply-adds, and where each node is computed.

What is counted is what ran, after all fusions: the runtime's own profile names the operator and the
shapes of every node. So a graph of any origin can be counted, and what is computed in 8 bits is
told from what is not.

B batch, T tokens, S tokens attended to, H width.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

import onnx

from exporters import ExportError
from exporters.onnx.session import Arrays, feeder, open_session

Shape = Sequence[int]

INT8: Final = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
PRECISIONS: Final[Mapping[str, str]] = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "double": "fp64",
}
UNKNOWN: Final = frozenset(
    {
        "ConvTranspose",
        "DecoderMaskedMultiHeadAttention",
        "DecoderMaskedSelfAttention",
        "DynamicQuantizeLSTM",
        "Einsum",
        "GRU",
        "LSTM",
        "LinearAttention",
        "LongformerAttention",
        "MoE",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "PagedAttention",
        "QAttention",
        "QMoE",
        "RNN",
        "SparseAttention",
    }
)
"""Operators that multiply, and that are not counted here."""


def multiply_adds(path: Path, inputs: Arrays) -> dict[str, int]:
    """Return the multiply-adds of one call on the CPU, by the precision that they are done in.

    Raises:
        ExportError: it has an operator that multiplies in a way that is not known here.
    """
    found: Counter[str] = Counter()
    for seen in _nodes(path, inputs, "cpu"):
        operator = seen["op_name"]
        if operator in UNKNOWN:
            raise ExportError(
                f"{path}: found the operator {operator}, whose multiply-adds are not counted"
            )
        if operator in COUNTS:
            shapes = [_shape(each) for each in seen["input_type_shape"]]
            results = [_shape(each) for each in seen["output_type_shape"]]
            kind = next(iter(seen["input_type_shape"][0]))
            precision = "int8" if operator in INT8 else PRECISIONS.get(kind, kind)
            found[precision] += COUNTS[operator](shapes, results)
    return dict(found)


def providers(path: Path, inputs: Arrays, device: str) -> dict[str, int]:
    """Return how many nodes of a call each execution provider computed.

    A session for CUDA leaves to the CPU what CUDA's provider has no kernel for, in silence.

    Raises:
        ExportError, MissingDependency, NotHere: see `predictor`.
    """
    return dict(Counter(seen["provider"] for seen in _nodes(path, inputs, device)))


def _nodes(path: Path, inputs: Arrays, device: str) -> Iterator[Mapping[str, Any]]:
    """Yield what ONNX Runtime says of every node that it computes in one call."""
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        session = open_session(path, device=device, threads=1, profile=Path(folder, "profile"))
        given = feeder({node.name: node.shape for node in session.get_inputs()})
        session.run(None, given(inputs))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            yield event["args"]


def _shape(described: Mapping[str, Shape]) -> Shape:
    (shape,) = described.values()
    return shape


def _product(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Return those of a matrix product, whose first matrix may stand transposed.

    The second one is hidden where the runtime packed it.
    """
    first, result = inputs[0], outputs[0]
    return prod(result) * prod(first[-2:]) // prod(result[-2:-1])


def _convolution(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Return those of a convolution; its kernel is `(channels, of a group, ...)`."""
    batch, _, *places = outputs[0]
    return batch * prod(places) * prod(inputs[1])


def _attention(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Return those of attention, given queries and keys `(..., S, H)`, or what makes them.

    ONNX Runtime's own operator `Attention` takes an input `(B, T, H)`, and computes queries, keys
    and values of one width first.
    """
    if len(inputs) > 1 and len(inputs[1]) > 2:  # noqa: PLR2004 - weights have two axes
        return 2 * prod(outputs[0]) * inputs[1][-2]
    _, tokens, width = inputs[0]
    return prod(outputs[0]) * (3 * width + 2 * tokens)


def _grouped_attention(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Return those of attention over a cache, which comes out as `(B, heads, S, width)`."""
    del inputs
    return 2 * prod(outputs[0]) * outputs[1][2]


COUNTS: Final[Mapping[str, Callable[[Sequence[Shape], Sequence[Shape]], int]]] = {
    **dict.fromkeys(
        (
            "DynamicQuantizeMatMul",
            "FusedGemm",
            "FusedMatMul",
            "Gemm",
            "MatMul",
            "MatMulBnb4",
            "MatMulInteger",
            "MatMulIntegerToFloat",
            "MatMulNBits",
            "QGemm",
            "QLinearMatMul",
        ),
        _product,
    ),
    **dict.fromkeys(("Conv", "ConvInteger", "FusedConv", "QLinearConv"), _convolution),
    **dict.fromkeys(("Attention", "MultiHeadAttention"), _attention),
    "GroupQueryAttention": _grouped_attention,
}


def bytes_read(path: Path) -> int:
    """Return the bytes of the weights that every call reads: all but the tables it looks up in."""
    graph = onnx.load(path, load_external_data=False).graph
    tables = {
        name for node in graph.node if node.op_type.startswith("Gather") for name in node.input
    }
    used = {name for node in graph.node if "Gather" not in node.op_type for name in node.input}
    count = 0
    for tensor in graph.initializer:
        if tensor.name in used or tensor.name not in tables:
            count += prod(tensor.dims) * _bits(tensor.data_type) // 8
    return count


def _bits(kind: int) -> int:
    if kind in {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}:
        return 4
    return 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
