"""Multiply-adds of a graph, from what ONNX Runtime says that it did."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters import ExportError
from exporters.onnx import counting

FLOAT, INT8, UINT8, INT32 = (
    getattr(TensorProto, name) for name in ("FLOAT", "INT8", "UINT8", "INT32")
)


def write(folder, nodes, given, *, kind=FLOAT, weights=None, domain=()):
    """Write a graph of one input `x`, and return its path."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, given)],
        [helper.make_tensor_value_info("y", INT32 if kind == UINT8 else FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 21), *(helper.make_opsetid(name, 1) for name in domain)]
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def ones(*shape, kind=np.float32):
    return np.ones(shape, kind)


CASES = {
    "product": (
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        ones(2, 5, 7), {"w": ones(7, 3)}, {"fp32": 2 * 5 * 7 * 3},
    ),
    "of two inputs": (
        [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
         helper.make_node("MatMul", ["x", "t"], ["y"])],
        ones(2, 5, 7), {}, {"fp32": 2 * 5 * 7 * 5},
    ),
    "transposed": (
        [helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)],
        ones(7, 5), {"w": ones(7, 3)}, {"fp32": 5 * 7 * 3},
    ),
    "int8": (
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        ones(4, 6, kind=np.uint8), {"w": ones(6, 3, kind=np.int8)}, {"int8": 4 * 6 * 3},
    ),
    "convolution": (
        [helper.make_node("Conv", ["x", "w"], ["y"], strides=[4, 4])],
        ones(2, 3, 8, 8), {"w": ones(16, 3, 4, 4)}, {"fp32": 2 * (2 * 2) * 16 * 3 * 4 * 4},
    ),
    "no product": ([helper.make_node("Relu", ["x"], ["y"])], ones(2, 5), {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_counted_by_hand(tmp_path, name):
    nodes, x, weights, expected = CASES[name]
    kind = UINT8 if x.dtype == np.uint8 else FLOAT
    path = write(tmp_path, nodes, x.shape, kind=kind, weights=weights)
    assert counting.multiply_adds(path, {"x": x}) == expected


def test_attention_as_one_operator(tmp_path):
    batch, tokens, width, heads = 2, 5, 8, 2
    attention = helper.make_node(
        "Attention", ["x", "w", "b"], ["y"], domain="com.microsoft", num_heads=heads
    )
    weights = {"w": ones(width, 3 * width), "b": ones(3 * width)}
    path = write(
        tmp_path, [attention], (batch, tokens, width), weights=weights, domain=["com.microsoft"]
    )
    made = batch * tokens * width * 3 * width
    attended = 2 * batch * tokens * tokens * width
    found = counting.multiply_adds(path, {"x": ones(batch, tokens, width)})
    assert found == {"fp32": made + attended}


def test_nodes_are_told_by_who_computed_them(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"]),
    ]
    path = write(tmp_path, nodes, (2, 3), weights={"w": ones(3, 4)})
    assert counting.providers(path, {"x": ones(2, 3)}, "cpu") == {"CPUExecutionProvider": 2}


def test_what_is_not_known_is_not_counted(tmp_path):
    node = helper.make_node("Einsum", ["x", "w"], ["y"], equation="ab,bc->ac")
    path = write(tmp_path, [node], (2, 3), weights={"w": ones(3, 4)})
    with pytest.raises(ExportError, match="found the operator Einsum, whose multiply-adds"):
        counting.multiply_adds(path, {"x": ones(2, 3)})


def test_tables_are_not_read_as_a_whole(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["at"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "at"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
    ]
    weights = {"table": ones(99, 8), "w": ones(8, 3)}
    assert counting.bytes_read(write(tmp_path, nodes, (2, 5), weights=weights)) == 8 * 3 * 4
