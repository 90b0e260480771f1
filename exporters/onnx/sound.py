"""Is a file a sound graph, with its weights in its own folder?"""

from pathlib import Path
from typing import Final

import onnx
from onnx import ModelProto, TensorProto, helper

from exporters import ExportError

OWN: Final = frozenset({"SimplifiedLayerNormalization"})
"""Operators of ONNX Runtime that it keeps in the standard's domain, which the checker has not."""
DOMAIN: Final = "com.microsoft"


def check(path: Path) -> None:
    """Raise ExportError if the graph at `path` is not sound.

    Nor is one whose weights lie outside its folder (onnx from 1.21 on).
    """
    try:
        graph = onnx.load(path, load_external_data=False)
        if any(node.op_type in OWN and not node.domain for node in graph.graph.node):
            _inside(graph, path.parent)
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


def _inside(graph: ModelProto, folder: Path) -> None:
    """Raise ExportError if a weight is not in a plain file of the folder."""
    for tensor in graph.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        about = {entry.key: entry.value for entry in tensor.external_data}
        path = folder / about["location"]
        end = int(about.get("offset", 0)) + int(about.get("length", 0))
        plain = path.name == about["location"] and path.is_file() and not path.is_symlink()
        if not plain or path.stat().st_size < end:
            raise ExportError(
                f"{folder}: found the weights {tensor.name} in {about['location']}, expected them"
                " in a whole file of that folder"
            )
