"""Int8 for ONNX graphs, by the libraries that do it.

Every method counts what it quantized: several library paths quantize nothing and say nothing.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import onnx

from exporters.onnx.graph import EXTERNAL_BYTES, data_file
from exporters.onnx.session import runtime

INTEGER_OPERATORS: Final = frozenset({"MatMulInteger", "DynamicQuantizeMatMul"})


class QuantizationError(RuntimeError):
    """Nothing was quantized."""


def int8_dynamic(source: Path, target: Path, *, embeddings: bool, reduce_range: bool) -> int:
    """Write `source` with int8 weights to `target`, activations quantized as they come.

    Weights are symmetric, one scale a column; embedding tables have one scale and are dequantized
    after the look-up. By onnxruntime.quantization,
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

    Args:
        source: an ONNX file, fused or not.
        target: the file to write.
        embeddings: quantize what `Gather` reads, too.
        reduce_range: 7-bit weights, for CPUs whose 8-bit products overflow 16 bits.

    Returns:
        The number of matrix products that run on integers.

    Raises:
        MissingDependency: onnxruntime is not installed.
        QuantizationError: no matrix product was quantized.
    """
    runtime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    operators = ["MatMul", "Gemm", *(["Gather"] if embeddings else [])]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # The exporter's shapes for initializers go stale when the quantizer transposes them.
        clean = Path(folder, "model.onnx")
        graph = onnx.load(source)
        initializers = {initializer.name for initializer in graph.graph.initializer}
        shapes = [info for info in graph.graph.value_info if info.name not in initializers]
        del graph.graph.value_info[:]
        graph.graph.value_info.extend(shapes)
        large = graph.ByteSize() >= EXTERNAL_BYTES
        beside = data_file(clean).name if large else None
        onnx.save(graph, clean, save_as_external_data=large, location=beside)
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it recommends a pre-processing that fails on such graphs
        try:
            quantize_dynamic(
                clean,
                target,
                op_types_to_quantize=operators,
                per_channel=True,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
                use_external_data_format=large,
            )
        finally:
            logging.disable(before)
    written = onnx.load(target, load_external_data=False)
    count = sum(node.op_type in INTEGER_OPERATORS for node in written.graph.node)
    if not count:
        raise QuantizationError(
            "int8-dynamic: found no matrix product with constant weights, expected at least one;"
            " nothing was quantized"
        )
    return count


METHODS: Final[Mapping[str, Callable[..., int]]] = {"int8-dynamic": int8_dynamic}
