"""The precisions of the products in a graph, and of the layers that compute them in its engine.

A strongly typed engine should have the types of its graph. That it has is not taken on trust: a
Q/DQ pair may be folded away, and then what was to be int8 is computed in fp32. The precision of a
product is the narrowest type of what it reads, of a weight the type that it is stored in.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import NodeProto, TensorProto

from exporters import ExportError

WIDTHS: Final = {"int4": 4, "int8": 8, "fp8": 8, "bf16": 16, "fp16": 16, "fp32": 32}
"""Precision -> bits of a number."""
PRODUCTS: Final = frozenset({"MatMul", "Gemm", "Conv"})
ALONG: Final = frozenset({"Transpose", "Reshape"})
"""What a constant may go through between where it is dequantized and where it is read."""
NAMES: Final = {
    TensorProto.INT4: "int4",
    TensorProto.INT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.FLOAT16: "fp16",
    TensorProto.FLOAT: "fp32",
}

# As TensorRT writes types, alone ("Half") or within a format ("Row major linear FP16 format").
WRITTEN: Final = {
    "int4": r"\bint4\b",
    "int8": r"\bint8\b",
    "fp8": r"\bfp8|\bfloat8",
    "bf16": r"\bbf16\b|\bbfloat16\b",
    "fp16": r"\bfp16\b|\bhalf\b|\bfloat16\b",
    "fp32": r"\bfp32\b|\bfloat\b|\bfloat32\b",
}
HEAVY: Final = re.compile(r"gemm|matmul|matrix_?multiply|conv(?!ert)|mha|attention", re.IGNORECASE)


def asked(path: Path) -> dict[str, int]:
    """Return how many products of the graph at `path` have each precision."""
    model = onnx.load(path, load_external_data=False)
    del model.graph.value_info[:]  # found anew below
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {i.name: i.data_type for i in graph.initializer}
    for info in (*graph.input, *graph.output, *graph.value_info):
        types[info.name] = info.type.tensor_type.elem_type
    makers = {name: node for node in graph.node for name in node.output}

    def precision(name: str) -> str | None:
        node: NodeProto | None = makers.get(name)
        while node is not None and node.op_type in ALONG:
            name, node = node.input[0], makers.get(node.input[0])
        if node is not None and node.op_type == "DequantizeLinear":
            name = node.input[0]
        return NAMES.get(types.get(name, 0))

    kinds = Counter(
        _narrowest(kind for name in node.input[:2] if (kind := precision(name)))
        for node in graph.node
        if node.op_type in PRODUCTS
    )
    return {kind: count for kind, count in sorted(kinds.items()) if kind}


def found(text: str) -> dict[str, int]:
    """Return how many heavy layers of an engine have each precision.

    Args:
        text: what an engine's inspector says, as JSON, in detail. Each of its `Layers` has
            `LayerType` and `TacticName`, and lists `Inputs` and `Outputs` with a `Format/Datatype`
            (TensorRT 10), which TensorRT 11 splits in two; layers that have weights may have
            `Weights` with a `Type`.
            https://docs.nvidia.com/deeplearning/tensorrt/10.16.1/inference-library/engine-tools.html
            https://docs.nvidia.com/deeplearning/tensorrt/11.0.0/api/migration/tensorrt-10x-to-11x.html
    """
    kinds = Counter(kind for layer in _heavy(text) if (kind := _narrowest(_types(layer))))
    return dict(sorted(kinds.items()))


def audit(wanted: Mapping[str, int], text: str) -> None:
    """Refuse an engine whose heavy layers do not have the precisions of its graph.

    Fusion makes several products one layer, so counts are not compared; but no more layers may be
    fp32 than products are, and every other precision has to be there.

    Args:
        wanted: what `asked` says of the graph.
        text: see `found`.

    Raises:
        ExportError: a precision is missing, layers fell back to fp32, or no types are told.
    """
    told = found(text)
    if not told:
        raise ExportError(
            "engine: found no product with a type among its layers, expected some; that it is what"
            " was asked for cannot be seen"
        )
    missing = [kind for kind in wanted if kind != "fp32" and kind not in told]
    if missing:
        raise ExportError(
            f"engine: found no {missing[0]} layer among {_said(told)}, expected some of the"
            f" {wanted[missing[0]]} that the graph has; what was to be {missing[0]} was folded away"
        )
    if told.get("fp32", 0) > wanted.get("fp32", 0):
        wide = [layer["Name"] for layer in _heavy(text) if _narrowest(_types(layer)) == "fp32"]
        raise ExportError(
            f"engine: found {told['fp32']} products in fp32, expected at most"
            f" {wanted.get('fp32', 0)} as in the graph; they are {', '.join(wide[:3])}"
        )


def _heavy(text: str) -> list[Mapping[str, Any]]:
    layers = [layer for layer in json.loads(text)["Layers"] if isinstance(layer, Mapping)]
    return [
        layer
        for layer in layers
        if HEAVY.search(" ".join(str(layer.get(k, "")) for k in ("LayerType", "TacticName")))
    ]


def _types(layer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the types of a layer's inputs and weights."""
    written = [
        str(value)
        for tensor in layer.get("Inputs", [])
        for key, value in tensor.items()
        if key.lower().endswith("datatype")
    ]
    weights = layer.get("Weights")
    if isinstance(weights, Mapping):
        written.append(str(weights.get("Type", "")))
    for text in written:
        for kind, pattern in WRITTEN.items():
            if re.search(pattern, text, re.IGNORECASE):
                yield kind
                break


def _narrowest(kinds: Iterable[str]) -> str | None:
    return min(kinds, key=lambda kind: WIDTHS[kind], default=None)


def _said(told: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in told.items())
