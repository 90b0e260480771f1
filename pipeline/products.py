"""Products with constant matrices, in the one form that the quantizers know: MatMul, `(I, O)`.

Exporters also write a Gemm, a FusedMatMul of a transposed matrix, or a Transpose in front: the head
of a language model reads its embedding table so.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from exporters.onnx.graph import MATRIX, PLACES


def constants(graph: ModelProto) -> dict[str, TensorProto]:
    """Return the constant matrices of a graph by their names."""
    return {x.name: x for x in graph.graph.initializer if len(x.dims) == MATRIX}


def weights(
    graph: ModelProto, left: frozenset[str]
) -> Iterator[tuple[NodeProto, int, TensorProto]]:
    """Yield the nodes that read a matrix in fp32, the place among their inputs, and the matrix."""
    known = constants(graph)
    for node in list(graph.graph.node):
        place = PLACES.get(node.op_type)
        if place is None or node.op_type == "FusedMatMul" or node.name in left:
            continue
        weight = known.get(node.input[place])
        if weight is not None and weight.data_type == TensorProto.FLOAT:
            yield node, place, weight


def straighten(graph: ModelProto, left: frozenset[str], *, tied: bool) -> None:
    """Make MatMuls of all products with constant matrices, in place; a Gemm leaves an Add behind.

    Args:
        graph: changed in place; it gives the same outputs.
        left: names of nodes that stay as they are.
        tied: of those too whose matrix is an embedding table. It is copied: do so only if both
            are going to be smaller.
    """
    known = constants(graph)
    tables = {node.input[0] for node in graph.graph.node if node.op_type == "Gather"}
    turned = {
        node.output[0]: node.input[0]
        for node in graph.graph.node
        if node.op_type == "Transpose" and node.input[0] in known
    }
    nodes: list[NodeProto] = []
    for node in graph.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        name, transposed = "", False
        if node.op_type == "MatMul" and node.input[1] in turned:
            name, transposed = turned[node.input[1]], True
        elif node.op_type in {"FusedMatMul", "Gemm"}:
            plain = attributes.get("alpha", 1) == attributes.get("beta", 1) == 1
            batched = attributes.get("transBatchA") or attributes.get("transBatchB")
            if plain and not batched and not attributes.get("transA"):
                name, transposed = node.input[1], bool(attributes.get("transB"))
        if name not in known or node.name in left or (name in tables and not tied):
            nodes.append(node)
            continue
        if transposed:
            name = _transposed(graph, known, name)
        nodes.extend(_product(node, name))
    replace(graph, nodes)


def replace(graph: ModelProto, nodes: list[NodeProto]) -> None:
    """Give the graph these nodes, in topological order, but for those that nothing reads."""
    read = {output.name for output in graph.graph.output}
    copies: list[NodeProto] = []
    for node in reversed(nodes):
        if read & set(node.output):
            copies.append(NodeProto.FromString(node.SerializeToString()))
            read |= _read(node)
    del graph.graph.node[:]
    graph.graph.node.extend(reversed(copies))
    unread = [x for x in graph.graph.initializer if x.name not in read]
    for initializer in unread:
        graph.graph.initializer.remove(initializer)
    own = any(node.domain == "com.microsoft" for node in copies)
    if own and all(opset.domain != "com.microsoft" for opset in graph.opset_import):
        graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _read(node: NodeProto) -> set[str]:
    """Return the names that a node reads, and those that nodes inside of it read."""
    inner = (other for attribute in node.attribute for other in attribute.g.node)
    return set(node.input).union(*(_read(other) for other in inner))


def _transposed(graph: ModelProto, known: dict[str, TensorProto], name: str) -> str:
    turned = f"{name}.transposed"
    if turned not in known:
        array = np.ascontiguousarray(numpy_helper.to_array(known[name]).T)
        known[turned] = numpy_helper.from_array(array, turned)
        graph.graph.initializer.append(known[turned])
    return turned


def _product(node: NodeProto, name: str) -> Iterator[NodeProto]:
    given: Any = node.output[0]
    biased = node.op_type == "Gemm" and len(node.input) > MATRIX
    product = f"{given}.product" if biased else given
    yield helper.make_node("MatMul", [node.input[0], name], [product], name=node.name)
    if biased:
        yield helper.make_node("Add", [product, node.input[2]], [given])
