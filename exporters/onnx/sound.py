"""Is a file a sound graph, with its weights in its own folder?"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Final

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from exporters import ExportError

OWN: Final = frozenset({"SimplifiedLayerNormalization"})
"""Operators of ONNX Runtime that it keeps in the standard's domain, which the checker has not."""
DOMAIN: Final = "com.microsoft"


def check(path: Path) -> None:
    """Raise ExportError if the graph at `path` is not sound, or has weights outside its folder."""
    try:
        graph = onnx.load(path, load_external_data=False)
        _inside(graph, path.parent)
        if any(node.op_type in OWN and not node.domain for node in graph.graph.node):
            onnx.checker.check_model(_known(graph))
        else:
            onnx.checker.check_model(str(path))
    except ExportError:
        raise
    except Exception as error:
        # DecodeError and ValidationError derive from Exception alone.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"{path}: not a sound graph: {reason}") from error


def _known(graph: ModelProto) -> ModelProto:
    """Return the graph as the checker can read it, without what lies beside it."""
    for node in graph.graph.node:
        if node.op_type in OWN and not node.domain:
            node.domain = DOMAIN
    if DOMAIN not in {opset.domain for opset in graph.opset_import}:
        graph.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    tensors = list(graph.graph.initializer)
    del graph.graph.initializer[:]
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL:
            given = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.graph.input.append(given)
        else:
            graph.graph.initializer.append(tensor)
    return graph


def _inside(model: ModelProto, folder: Path) -> None:
    """Raise ExportError if a weight is not in a plain file of the folder, with one name.

    ONNX Runtime follows hard links, and links within the folder; neither is safe from a change.
    """
    nodes = chain.from_iterable(function.node for function in model.functions)
    for tensor in chain(_tensors(model.graph), _held(nodes)):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        about = {entry.key: entry.value for entry in tensor.external_data}
        path = folder / about["location"]
        offset, length = int(about.get("offset", 0)), int(about.get("length", 0))
        plain = (
            path.name == about["location"]
            and not path.is_symlink()
            and path.is_file()
            and path.stat().st_nlink == 1
        )
        if not plain or min(offset, length) < 0 or path.stat().st_size < offset + length:
            raise ExportError(
                f"{folder}: found the weights {tensor.name} in {about['location']}, expected them"
                " in a whole file of that folder, no link"
            )


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield every tensor of a graph and of those inside of it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _held(graph.node)


def _held(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    """Yield every tensor that nodes hold as an attribute, at any depth."""
    for attribute in chain.from_iterable(node.attribute for node in nodes):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _tensors(graph)
