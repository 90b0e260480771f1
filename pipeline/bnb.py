"""Weights in the formats of bitsandbytes: quantized in torch, and carried over to ONNX.

No exporter knows the library's layers. So they become plain ones, which multiply with what the
codes stand for; the graph is written; and every matrix in it that was such a layer's gets the
layer's own codes and scales in its place. Nothing is rounded a second time.

A matrix is `(O, I)`: outputs, inputs. `bnb-int8` has a scale for each output (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339); `bnb-nf4` one for every 64 weights in the order of the rows,
across their ends (NF4 of Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from exporters import MissingDependency
from exporters.onnx.graph import store
from pipeline.products import replace, straighten, weights
from pipeline.quantization import QuantizationError
from pipeline.weight_only import LARGEST

METHODS: Final[Mapping[str, Mapping[str, Any]]] = {
    "bnb-int8": {"load_in_8bit": True},
    "bnb-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
"""Method -> what the library's configuration says of it; the rest is as the library has it."""
NF4: Final = 1
"""The name of the code book in ONNX Runtime's MatMulBnb4."""
PANEL: Final = 32
"""Rows that the library packs together on CPUs with AVX512-BF16."""


@dataclass(frozen=True)
class Codes:
    """What a quantized layer holds, and the matrix `(O, I)` that it stands for.

    int8: codes `(O, I)`, scales `(O,)`. NF4: two codes a byte `(O I / 2,)`, the first of them in
    the upper half, and the scale of each block `(O I / block_size,)`.
    """

    codes: NDArray[Any]
    scales: NDArray[np.float32]
    matrix: NDArray[np.float32]
    block_size: int | None


def library() -> ModuleType:
    """Return the module `bitsandbytes`.

    Raises:
        MissingDependency: it is not installed.
    """
    # On CPUs with AVX512-BF16 it would fetch a faster kernel from the hub, a binary, if it could.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        with _hidden("kernels"):
            found = import_module("bitsandbytes")
    except ImportError:
        raise MissingDependency(
            "bitsandbytes: not installed; it comes with both extras: pip install -e '.[cpu]' or"
            " pip install -e '.[gpu]'"
        ) from None
    # At every call of every int8 layer it says that it rounds activations to fp16 first.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return found


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Let a module count as not installed until the block ends."""
    before = sys.modules.get(name)
    modules: dict[str, Any] = sys.modules
    modules[name] = None  # import takes it for a module that is not there
    try:
        yield
    finally:
        del modules[name]
        if before is not None:
            modules[name] = before


def asked_for(config: Any) -> bool:
    """Return whether a model's quantization configuration, as read or as made, is the library's."""
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return bool(method == "bitsandbytes")


def configuration(method: str, model: PreTrainedModel) -> BitsAndBytesConfig:
    """Return how a model is quantized as it is loaded: all of its layers but the task's head.

    Args:
        method: one of `METHODS`.
        model: the model, with or without its weights.
    """
    inside = model.base_model_prefix
    heads = [name for name, child in model.named_children() if name != inside and _linears(child)]
    if not hasattr(model, inside):  # T5: the encoder and the decoder lie beside the head
        last = model.get_output_embeddings()
        heads = [name for name, module in model.named_modules() if module is last]
    return BitsAndBytesConfig(**METHODS[method], llm_int8_skip_modules=heads)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that are quantized, by their paths; none if the library is not needed."""
    kinds = ("Linear8bitLt", "Linear4bit")
    return {name: m for name, m in model.named_modules() if type(m).__name__ in kinds}


def count(model: PreTrainedModel, method: str) -> int:
    """Return how many layers are quantized.

    Raises:
        QuantizationError: none is.
    """
    found = len(layers(model))
    if not found:
        raise QuantizationError(
            f"{method}: found no layer of {type(model).__name__} that bitsandbytes quantizes,"
            " expected at least one; nothing was quantized"
        )
    return found


def settle(model: nn.Module) -> None:
    """Let layers compute right whose shape the library's kernels for AVX512 do not take, in place.

    Such shapes are common in layers that were cut. On CPUs with AVX512-BF16 the library (0.50)
    packs NF4 matrices in panels, and fails where these do not come out even. On CPUs with AVX512
    it takes each row to start a block, and computes with the scales of others where none does;
    such layers are multiplied in the same way on all CPUs.
    """
    for layer in layers(model).values():
        state = getattr(layer.weight, "quant_state", None)
        if state is not None and state.shape[1] % state.blocksize:
            setattr(layer, "forward", partial(_forward, layer, layer.forward))  # noqa: B010
        elif state is not None and state.shape[0] % PANEL:
            setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not on Module


def check_unpacked(model: nn.Module) -> None:
    """Check that layers still hold their scales in fp32.

    The library (0.50) rounds those of NF4 to bf16 at the first call on a CPU with AVX512-BF16, and
    would save them in another order than it reads them.

    Raises:
        QuantizationError: they do not.
    """
    for name, layer in layers(model).items():
        state = getattr(layer.weight, "quant_state", None)
        if state is not None and state.absmax.dtype == torch.bfloat16:
            raise QuantizationError(
                f"{name}: found scales that bitsandbytes has rounded to bf16 at the first call on"
                " this CPU, expected those in fp32; open the folder again, and save or export the"
                " model before it is called"
            )


def _forward(
    layer: Any, elsewhere: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """Return what a layer of the library gives for `x` (..., I): (..., O), in the dtype of `x`.

    `elsewhere` is its own way, which devices other than the CPU take.
    """
    if x.device.type != "cpu":
        return elsewhere(x)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return nn.functional.linear(x, _matrix(layer).to(x.dtype), bias)


def _matrix(layer: Any) -> torch.Tensor:
    """Return what the codes of an NF4 layer stand for, `(O, I)` in fp32 on the CPU.

    By rows of one block each, or all in one, since blocks go on from row to row, which the
    library's kernel for AVX512 misses.
    """
    state = copy(layer.weight.quant_state)
    shape, size = state.shape, state.shape.numel()
    even = size % state.blocksize == 0
    state.shape = torch.Size([size // state.blocksize, state.blocksize] if even else [size])
    state.absmax = state.absmax.cpu()
    functional = import_module("bitsandbytes.functional")  # the layer's own, imported before it
    matrix = functional.dequantize_4bit(layer.weight.data.cpu(), state)
    whole: torch.Tensor = matrix.float().reshape(shape)
    return whole


def plain(model: PreTrainedModel) -> dict[str, Codes]:
    """Put plain layers in the place of quantized ones, in place, and return what those held.

    Raises:
        QuantizationError: a layer's format is not one of `METHODS`, or its scales were rounded.
    """
    check_unpacked(model)
    found = {}
    for name, layer in layers(model).items():
        held = found[name] = _codes(name, layer)
        outputs, inputs = held.matrix.shape
        with torch.device("meta"):
            linear = nn.Linear(inputs, outputs, bias=layer.bias is not None)
        linear.weight = nn.Parameter(torch.from_numpy(held.matrix), requires_grad=False)
        setattr(linear, "bias", layer.bias)  # noqa: B010 - a Parameter or none
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, linear)
    if found:
        quantizer: Any = model.hf_quantizer
        quantizer.remove_quantization_config(model)
    return found


def _codes(name: str, layer: Any) -> Codes:
    if type(layer).__name__ == "Linear8bitLt":
        codes = layer.weight.data.cpu().numpy()
        # Its first call moves them from the weight to the layer's state.
        largest = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        scales = largest.float().cpu().numpy() / np.float32(LARGEST)
        return Codes(codes, scales, codes * scales[:, None], None)
    state = layer.weight.quant_state
    if state.quant_type != "nf4" or state.nested:
        kind = f"{state.quant_type}{' with quantized scales' if state.nested else ''}"
        raise QuantizationError(
            f"{name}: found {kind}, expected nf4 whose scales are fp32; quantize it with bnb-nf4"
        )
    codes = layer.weight.data.cpu().view(torch.uint8).numpy().reshape(-1)
    scales = state.absmax.float().cpu().numpy()
    return Codes(codes, scales, _matrix(layer).numpy(), state.blocksize)


def carry_over(graphs: Sequence[Path], folder: Path, held: Mapping[str, Codes]) -> int:
    """Write graphs with the codes of their layers, and return how many products read such.

    A matrix that several layers were packed into is taken apart: a block of weights may lie across
    the border between two of them.

    Args:
        graphs: those of the model that `plain` made.
        folder: where they are written, under their names.
        held: what `plain` returned.

    Raises:
        QuantizationError: the matrix of a layer is in none of the graphs.
    """
    carried = [name for path in graphs for name in _carry_over(path, folder / path.name, held)]
    # Layers that were copied from one another have one matrix between them.
    there = {held[name].matrix.tobytes() for name in carried}
    missing = [name for name, codes in held.items() if codes.matrix.tobytes() not in there]
    if missing:
        raise QuantizationError(
            f"{graphs[-1].name}: found no matrix of {missing[0]} and {len(missing) - 1} more of"
            f" {len(held)} layers, expected all of them; the exporter changed what it wrote"
        )
    return len(carried)


def _carry_over(source: Path, target: Path, held: Mapping[str, Codes]) -> list[str]:
    """Write a graph with the codes of its layers, and return their names, one a product."""
    graph = onnx.load(source)
    del graph.graph.value_info[:]
    straighten(graph, frozenset(), tied=False)
    by_first_row: dict[bytes, list[str]] = {}
    for name, codes in held.items():
        by_first_row.setdefault(codes.matrix[0].tobytes(), []).append(name)
    products = {}
    for node, _, weight in weights(graph, frozenset()):
        if node.op_type == "MatMul":
            matrix = numpy_helper.to_array(weight).T
            names = _side_by_side(np.ascontiguousarray(matrix), held, by_first_row)
            if names:
                products[node.output[0]] = names
    carried = [name for names in products.values() for name in names]
    nodes: list[NodeProto] = []
    for node in graph.graph.node:
        names = products.get(node.output[0], [])
        nodes.extend(_multiplied(node, names, held) if names else [node])
    for name in dict.fromkeys(carried):
        graph.graph.initializer.extend(_constants(name, held[name]))
    replace(graph, nodes)
    store(graph, target)
    return carried


def _side_by_side(
    matrix: NDArray[Any], held: Mapping[str, Codes], by_first_row: Mapping[bytes, Sequence[str]]
) -> list[str]:
    """Return the layers whose rows are those of a matrix `(O, I)`, in turn; none if others are."""
    names: list[str] = []
    at = 0
    while at < len(matrix):
        for name in by_first_row.get(matrix[at].tobytes(), ()):
            rows = held[name].matrix
            if np.array_equal(matrix[at : at + len(rows)], rows):
                names.append(name)
                at += len(rows)
                break
        else:
            return []
    return names


def _multiplied(
    node: NodeProto, names: Sequence[str], held: Mapping[str, Codes]
) -> Iterator[NodeProto]:
    """Yield what gives the output of a product with several layers, side by side."""
    whole = node.output[0]
    outputs = [f"{whole}.{at}" for at in range(len(names))] if len(names) > 1 else [whole]
    for name, output in zip(names, outputs, strict=True):
        codes = held[name]
        constants = [f"{name}.codes", f"{name}.scales"]
        if codes.block_size is None:
            matrix = f"{output}.matrix"
            yield helper.make_node("DequantizeLinear", constants, [matrix], axis=1)
            yield helper.make_node("MatMul", [node.input[0], matrix], [output], name=name)
        else:
            rows, columns = codes.matrix.shape
            yield helper.make_node(
                "MatMulBnb4",
                [node.input[0], *constants],
                [output],
                name=name,
                domain="com.microsoft",
                K=columns,
                N=rows,
                block_size=codes.block_size,
                quant_type=NF4,
            )
    if len(names) > 1:
        yield helper.make_node("Concat", outputs, [whole], axis=-1)


def _constants(name: str, codes: Codes) -> list[onnx.TensorProto]:
    packed = codes.codes.T if codes.block_size is None else codes.codes
    parts = {"codes": np.ascontiguousarray(packed), "scales": codes.scales}
    return [numpy_helper.from_array(array, f"{name}.{part}") for part, array in parts.items()]


def _linears(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Linear | Conv1D) for inner in module.modules())
