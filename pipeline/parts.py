"""What a model's parameters, or the bytes of its file, are spent on."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import onnx
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline import structure
from pipeline.counting import nearest

PARTS: Final = ("embeddings", "attention", "ffn", "rest of the layers", "head and rest")


def places(model: PreTrainedModel) -> dict[str, str]:
    """Return module path -> part; what lies in none of the modules belongs to the last part.

    Of a family that cannot be cut, or was not tried by `selfcheck`, only the embeddings are told
    from the rest.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            found[name] = "embeddings"
    try:
        groups = structure.groups(model)
    except ValueError:
        return found
    for group in groups:
        paths = [group.path]
        if not group.part.path:  # the FFN's matrices lie on the layer itself
            paths = [f"{group.path}.{part.path}" for part in group.part.inputs]
            paths.append(f"{group.path}.{group.part.output}")
        found |= dict.fromkeys(paths, "ffn" if group.kind == "neurons" else "attention")
    if groups:
        base = structure.prefix(model)
        for stack, layers in structure.stacks(model):
            for at in range(len(layers)):
                found.setdefault(f"{base}{stack.layers}.{at}", "rest of the layers")
    return found


def part_of(name: str, known: Mapping[str, str]) -> str:
    """Return the part that a parameter or a module belongs to; `known` is what `places` gave."""
    place = name if name in known else nearest(name, known)
    return PARTS[-1] if place is None else known[place]


def parameters(model: PreTrainedModel, known: Mapping[str, str]) -> dict[str, int]:
    """Return the number of parameters by part."""
    return _sums(model, known, Tensor.numel)


def bytes_of_model(model: PreTrainedModel) -> dict[str, int]:
    """Return the bytes of the parameters by part."""
    return _sums(model, places(model), lambda parameter: parameter.nbytes)


def bytes_of_tensors(paths: Iterable[Path], known: Mapping[str, str]) -> dict[str, int]:
    """Return the bytes of the tensors in safetensors files by part: scales are their layer's."""
    found = dict.fromkeys(PARTS, 0)
    for path in paths:
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                found[part_of(name, known)] += tensors.get_tensor(name).nbytes
    return found


def _sums(
    model: PreTrainedModel, known: Mapping[str, str], size: Callable[[Tensor], int]
) -> dict[str, int]:
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        found[part_of(name, known)] += size(parameter)
    return found


def bytes_of_graph(path: Path, model: PreTrainedModel) -> dict[str, int]:
    """Return the bytes of a graph's constants by part.

    A constant belongs to the module that it, or the node that reads it in the end, is named after
    (see `exporters.onnx.graph.name_nodes`). What names tell nothing of belongs to the last part.

    Args:
        path: an ONNX file, quantized or not.
        model: what it was exported from; its weights are not looked at.
    """
    known = places(model)
    modules = {name for name, _ in model.named_modules() if name}
    graph = onnx.load(path, load_external_data=False).graph
    readers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, node)

    def names(constant: str) -> Iterator[str]:
        yield constant.removeprefix("called.")
        reader = readers.get(constant)
        while reader is not None:
            yield reader.name
            reader = readers.get(reader.output[0]) if reader.op_type in PASSING else None

    looked_up = {name for node in graph.node if "Gather" in node.op_type for name in node.input[:1]}
    looked_up |= {name for node in graph.node if node.output[0] in looked_up for name in node.input}
    found = dict.fromkeys(PARTS, 0)
    for constant in graph.initializer:
        size = next((int(e.value) for e in constant.external_data if e.key == "length"), 0)
        module = next((m for n in names(constant.name) if (m := _module(n, modules))), "")
        part = "embeddings" if constant.name in looked_up and module else part_of(module, known)
        found[part] += size or len(constant.raw_data) or constant.ByteSize()
    return found


PASSING: Final = frozenset({"Cast", "DequantizeLinear", "QuantizeLinear", "Reshape", "Transpose"})
"""Operators that hand a constant on to what multiplies with it."""


def _module(name: str, modules: set[str]) -> str:
    """Return the longest module path that a name begins with; quantizers put endings behind it."""
    while name and name not in modules:
        at = max(name.rfind("."), name.rfind("_"))
        name = name[: max(at, 0)]
    return name
