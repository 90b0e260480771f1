"""Migrate what is hard to quantize from activations to weights.

A few channels of an activation are many times larger than the others, and one scale for all of them
leaves little for the rest. With s a positive number for each channel,

    X W = (X diag(s)^-1) (diag(s) W),      s_j = max|X_j|^a / max|W_j|^(1 - a)

gives the same product, and smoother factors. SmoothQuant, equation 4,
https://arxiv.org/abs/2211.10438

I inputs of a matrix.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from exporters.onnx.session import Arrays, run_over
from pipeline.products import weights

SMALLEST: Final = 1e-5


def migrate(
    graph: ModelProto,
    strength: float,
    calibration: Callable[[], Iterator[Arrays]],
    left: frozenset[str] = frozenset(),
) -> int:
    """Divide the inputs of the graph's matrices by s and multiply the matrices by it, in place.

    Matrices that read the same input share one s; one that several inputs read, as ALBERT's layers
    do, has none. Return the number of inputs that were divided.

    Args:
        graph: changed in place; it gives the same outputs.
        strength: a, in (0, 1): how much is moved from the activations to the weights.
        calibration: gives batches of inputs.
        left: names of nodes that stay as they are.
    """
    uses = Counter(name for node in graph.graph.node for name in node.input)
    constants: dict[str, TensorProto] = {}
    readers: dict[str, list[NodeProto]] = {}
    for node, _, weight in weights(graph, left):
        if node.op_type == "MatMul" and uses[weight.name] == 1:
            constants[weight.name] = weight
            readers.setdefault(node.input[0], []).append(node)
    widths = {name: constants[nodes[0].input[1]].dims[0] for name, nodes in readers.items()}
    largest = _largest(graph, widths, calibration)
    for name, nodes in readers.items():
        matrices = {n.input[1]: numpy_helper.to_array(constants[n.input[1]]) for n in nodes}
        of_weights = np.max([np.abs(w).max(axis=1) for w in matrices.values()], axis=0)
        raised = np.maximum(largest[name], SMALLEST) ** strength
        scale = raised / np.maximum(of_weights, SMALLEST) ** (1 - strength)
        scale = np.maximum(scale, SMALLEST).astype(np.float32)
        for which, matrix in matrices.items():
            scaled = numpy_helper.from_array((matrix * scale[:, None]).astype(np.float32), which)
            constants[which].CopyFrom(scaled)
        graph.graph.initializer.append(numpy_helper.from_array(1 / scale, f"{name}.divisor"))
        divided = helper.make_node("Mul", [name, f"{name}.divisor"], [f"{name}.divided"])
        at = min(list(graph.graph.node).index(node) for node in nodes)
        for node in nodes:
            node.input[0] = f"{name}.divided"
        graph.graph.node.insert(at, divided)
    return len(readers)


def _largest(
    graph: ModelProto, widths: Mapping[str, int], calibration: Callable[[], Iterator[Arrays]]
) -> dict[str, NDArray[Any]]:
    """Return max|X_j| of every channel j of the tensors over all data `(I,)`; `widths` are I."""
    names = list(widths)
    watched = ModelProto()
    watched.CopyFrom(graph)
    outputs = [f"largest.{at}" for at in range(len(names))]
    for name, output in zip(names, outputs, strict=True):
        absolute, rows = f"{output}.absolute", f"{output}.rows"
        watched.graph.node.extend(
            [
                helper.make_node("Abs", [name], [absolute]),
                helper.make_node("Reshape", [absolute, f"{output}.shape"], [rows]),
                helper.make_node("ReduceMax", [rows, "largest.axes"], [output], keepdims=0),
            ]
        )
        shape = np.array([-1, widths[name]])
        watched.graph.initializer.append(numpy_helper.from_array(shape, f"{output}.shape"))
        watched.graph.output.append(
            helper.make_tensor_value_info(output, TensorProto.FLOAT, [widths[name]])
        )
    watched.graph.initializer.append(numpy_helper.from_array(np.array([0]), "largest.axes"))
    found = {name: np.zeros(widths[name], np.float32) for name in names}
    for values in run_over(watched, calibration(), outputs):
        for name, value in zip(names, values, strict=True):
            found[name] = np.maximum(found[name], value)
    return found
