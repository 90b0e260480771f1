"""Weights in fewer bits, activations as they were.

Two forms: blocks with a scale each, multiplied by ONNX Runtime's own operators or dequantized by
standard ones, from the quantizers of onnxruntime; and int8 with a scale for each column, or row of
a table, dequantized by a standard operator, which those do not write.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from scipy.linalg import cholesky
from scipy.linalg.lapack import dtrtri

from exporters.onnx.session import Arrays, run_over
from pipeline.products import replace, weights

ALGORITHMS: Final = frozenset({"gptq", "hqq", "k-quant", "rtn"})
CALIBRATED: Final = frozenset({"gptq"})
"""The algorithms that need data."""
ASYMMETRIC: Final = frozenset({"hqq", "k-quant"})
"""The algorithms whose blocks always have a zero point."""
OWN_NODES: Final = frozenset({"gptq", "k-quant"})
LARGEST: Final = 127
"""The largest code of int8."""
MOST, MIDDLE = 15, 8
"""The largest code of uint4, and the one that stands for 0 where there are no zero points."""
DAMPING: Final = 0.01
"""Of GPTQ, as a fraction of the mean of the diagonal."""


def blockwise(
    graph: ModelProto,
    bits: int,
    algorithm: str,
    block_size: int,
    left: frozenset[str],
    *,
    symmetric: bool,
    embeddings: bool = False,
    portable: bool = False,
    calibration: Callable[[], Iterator[Arrays]] = lambda: iter(()),
) -> ModelProto:
    """Return the graph with its matrices in blocks of `block_size` weights of a column.

    Args:
        graph: changed in place, as far as the library does; see `products.straighten`.
        bits: 4, or 8 with `rtn`.
        algorithm: one of `ALGORITHMS`. RTN rounds; k-quant searches each block's scale and zero
            point (https://github.com/ggml-org/llama.cpp/pull/1684); HQQ solves for the zero point
            (https://mobiusml.github.io/hqq_blog/); GPTQ makes up for each column's error in those
            that follow, https://arxiv.org/abs/2210.17323
        block_size: weights that share a scale.
        left: names of nodes that stay as they are.
        symmetric: no zero points; see `ASYMMETRIC`.
        embeddings: embedding tables too, in blocks of a row, rounded; in int8 if `portable`.
        portable: standard operators alone, with `rtn` and 4 bits only.
        calibration: gives batches of inputs, for `CALIBRATED`.
    """
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    form = QuantFormat.QDQ if portable else QuantFormat.QOperator
    rounding: dict[str, Any] = {
        "block_size": block_size,
        "is_symmetric": symmetric,
        "quant_format": form,
        "bits": bits,
    }

    def run(graph: ModelProto, config: Any) -> ModelProto:
        quantizer = library.MatMulNBitsQuantizer(
            graph,
            bits=bits,
            block_size=block_size,
            is_symmetric=symmetric,
            nodes_to_exclude=sorted(left),
            algo_config=config,
        )
        quantizer.process()
        found: ModelProto = quantizer.model.model
        return found

    if algorithm in OWN_NODES:
        _in_blocks(graph, algorithm, block_size, left, calibration, symmetric=symmetric)
    elif algorithm == "hqq":
        graph = run(graph, library.HQQWeightOnlyQuantConfig(block_size=block_size))
    else:
        graph = run(graph, library.DefaultWeightOnlyQuantConfig(**rounding))
    if embeddings and bits == 4 and not portable:  # noqa: PLR2004
        gathers = rounding | {"op_types_to_quantize": ("Gather",), "quant_axes": (("Gather", 1),)}
        graph = run(graph, library.DefaultWeightOnlyQuantConfig(**gathers))
    elif embeddings and not portable:
        _tables(graph, block_size, left)
    elif embeddings:
        dequantized(graph, left, matrices=False, embeddings=True)
    return graph


def gptq(
    weight: NDArray[Any], gram: NDArray[Any], block_size: int, *, symmetric: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Return 4-bit codes `(K, N)` of a matrix, and each block's scale and zero point `(B, N)`.

    Row by row, what rounding does to the outputs is made up for by the rows that follow. Frantar et
    al. 2022, algorithm 1, https://arxiv.org/abs/2210.17323

    Args:
        weight: `(K, N)`.
        gram: the second moments of the inputs, `(K, K)`, by any factor.
        block_size: rows that share a scale; B blocks.
        symmetric: all zero points are in the middle.
    """
    left, gram = weight.astype(np.float64), gram.copy()
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    left[dead] = 0
    np.fill_diagonal(gram, gram.diagonal() + DAMPING * gram.diagonal().mean())
    upper = _root_of_inverse(gram)
    codes = np.zeros(weight.shape, np.uint8)
    scales, zeros = [], []
    for start in range(0, len(weight), block_size):
        rows = slice(start, min(start + block_size, len(weight)))
        scale, zero = _span(left[rows], symmetric=symmetric)
        errors = np.zeros_like(left[rows])
        for at in range(rows.start, rows.stop):
            codes[at] = np.clip(np.rint(left[at] / scale) + zero, 0, MOST)
            error = (left[at] - scale * (codes[at] - zero)) / upper[at, at]
            left[at : rows.stop] -= np.outer(upper[at, at : rows.stop], error)
            errors[at - rows.start] = error
        left[rows.stop :] -= upper[rows, rows.stop :].T @ errors
        scales.append(scale)
        zeros.append(zero)
    return codes, np.array(scales, np.float32), np.array(zeros, np.uint8)


def _root_of_inverse(matrix: NDArray[Any]) -> NDArray[Any]:
    """Return the upper triangular U with UT U = the inverse of a positive definite matrix.

    From its Cholesky factor in the opposite order, without the inverse itself.
    """
    factor = cholesky(matrix[::-1, ::-1], lower=True)
    inverse, _ = dtrtri(factor, lower=1, overwrite_c=1)
    root: NDArray[Any] = inverse[::-1, ::-1]
    return root


def _span(rows: NDArray[Any], *, symmetric: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the scale and zero point of each column of a block `(N,)`."""
    if symmetric:
        scale = np.abs(rows).max(0) / (MOST - MIDDLE)
        return np.where(scale == 0, 1.0, scale), np.full(rows.shape[1], MIDDLE)
    low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
    scale = (high - low) / MOST
    scale = np.where(scale == 0, 1.0, scale)
    return scale, np.rint(-low / scale)


def _in_blocks(
    graph: ModelProto,
    algorithm: str,
    block_size: int,
    left: frozenset[str],
    calibration: Callable[[], Iterator[Arrays]],
    *,
    symmetric: bool,
) -> None:
    """Quantize matrices by k-quant or GPTQ, in place.

    The library's own nodes are wrong where a matrix has an odd number of blocks with zero points
    (onnxruntime 1.31), and its GPTQ rounds twice.
    """
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    chosen = [(n, w) for n, place, w in weights(graph, left) if place == 1]
    grams = {}
    if algorithm == "gptq":
        widths = {node.input[0]: weight.dims[0] for node, weight in chosen}
        grams = _grams(graph, widths, calibration)
    nodes = list(graph.graph.node)
    for node, weight in chosen:
        array = numpy_helper.to_array(weight)
        blocks = -(-len(array) // block_size)
        if algorithm == "gptq":
            quantized = gptq(array, grams[node.input[0]], block_size, symmetric=symmetric)
        else:
            padded = np.pad(array, ((0, blocks * block_size - len(array)), (0, 0)))
            found = quant_tensor_k_quant_cpu(np.ascontiguousarray(padded.T), 4, block_size)
            of_columns = found[0].reshape(array.shape[1], -1)[:, : len(array)]
            scales, zeros = (part.reshape(array.shape[1], blocks).T for part in found[1:])
            quantized = of_columns.T.astype(np.uint8), scales, zeros
        nodes[nodes.index(node)] = _block_node(graph, node, weight.name, quantized, block_size)
    replace(graph, nodes)


def _block_node(
    graph: ModelProto,
    node: NodeProto,
    name: str,
    quantized: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    block_size: int,
) -> NodeProto:
    """Return the node that multiplies with a matrix in the form in which `gptq` returns it.

    Its constants go into the graph.

    Layout: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """
    codes, scales, zeros = quantized
    rows, columns = codes.shape
    blocks = len(scales)
    padded = np.full((columns, blocks * block_size), MIDDLE, np.uint8)
    padded[:, :rows] = codes.T
    parts = {
        f"{name}.{node.name}.codes": _packed(padded).reshape(columns, blocks, block_size // 2),
        f"{name}.{node.name}.scales": scales.T.astype(np.float32),
    }
    if (zeros != MIDDLE).any():
        parts[f"{name}.{node.name}.zeros"] = _packed(np.pad(zeros.T, ((0, 0), (0, blocks % 2))))
    graph.graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(array), key) for key, array in parts.items()
    )
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], *parts],
        list(node.output),
        name=node.name,
        domain="com.microsoft",
        K=rows,
        N=columns,
        bits=4,
        block_size=block_size,
    )


def _packed(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Return two codes a byte, the first of them in the lower half."""
    pairs = codes.astype(np.uint8)
    return np.bitwise_or(pairs[:, ::2], np.left_shift(pairs[:, 1::2], 4), dtype=np.uint8)


def _grams(
    graph: ModelProto, widths: dict[str, int], calibration: Callable[[], Iterator[Arrays]]
) -> dict[str, NDArray[Any]]:
    """Return the second moments `(K, K)` of tensors, the sum over all rows of the data."""
    watched = ModelProto()
    watched.CopyFrom(graph)
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in widths
    )
    found = {name: np.zeros((width, width)) for name, width in widths.items()}
    for arrays in run_over(watched, calibration(), list(widths)):
        for (name, width), array in zip(widths.items(), arrays, strict=True):
            rows = array.reshape(-1, width).astype(np.float64)
            found[name] += rows.T @ rows
    return found


def dequantized(
    graph: ModelProto, left: frozenset[str], *, matrices: bool = True, embeddings: bool = False
) -> None:
    """Put int8 weights behind a DequantizeLinear, in place.

    A matrix `(I, O)` gets a scale for each of its O columns, a table `(V, D)` for each of its rows.
    """
    added: dict[str, NodeProto] = {}
    for node, place, weight in weights(graph, left):
        table = node.op_type == "Gather"
        if not (embeddings if table else matrices):
            continue
        name = weight.name
        if name not in added:
            codes, scales = rounded(numpy_helper.to_array(weight), int(table))
            parts: list[tuple[str, NDArray[Any]]]
            parts = [(f"{name}.codes", codes), (f"{name}.scales", scales.squeeze(int(table)))]
            graph.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in parts)
            added[name] = helper.make_node(
                "DequantizeLinear",
                [n for n, _ in parts],
                [f"{name}.dequantized"],
                axis=int(not table),
            )
        node.input[place] = f"{name}.dequantized"
    replace(graph, [*added.values(), *graph.graph.node])


def rounded(weight: NDArray[Any], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return int8 codes of a tensor, and the scales of what shares one along `axis`."""
    scales = np.abs(weight).max(axis=axis, keepdims=True) / LARGEST
    scales = np.maximum(scales, np.finfo(np.float32).tiny).astype(np.float32)
    return np.clip(np.rint(weight / scales), -LARGEST, LARGEST).astype(np.int8), scales


def _tables(graph: ModelProto, block_size: int, left: frozenset[str]) -> None:
    """Put embedding tables into blocks of int8, looked up by an operator of ONNX Runtime's own."""
    nodes = list(graph.graph.node)
    for node, _, weight in weights(graph, left):
        if node.op_type != "Gather":
            continue
        array = numpy_helper.to_array(weight)
        rows, width = array.shape
        padded = np.pad(array, ((0, 0), (0, -width % block_size)))
        codes, scales = rounded(padded.reshape(rows, -1, block_size), 2)
        codes = codes.reshape(rows, -1)[:, :width]
        parts: dict[str, NDArray[Any]] = {
            f"{weight.name}.codes": (codes.astype(np.int16) + 128).astype(np.uint8),
            f"{weight.name}.scales": scales.squeeze(2),
        }
        known = {initializer.name for initializer in graph.graph.initializer}
        graph.graph.initializer.extend(
            numpy_helper.from_array(a, name) for name, a in parts.items() if name not in known
        )
        codes_name, scales_name = parts
        nodes[nodes.index(node)] = helper.make_node(
            "GatherBlockQuantized",
            [codes_name, node.input[1], scales_name],
            list(node.output),
            name=node.name,
            domain="com.microsoft",
            bits=8,
            block_size=block_size,
            quantize_axis=1,
            gather_axis=0,
        )
    replace(graph, nodes)
