"""A torch module becomes an ONNX file.

The graph is written by `transformers.exporters`, with dynamic axes, and for ONNX Runtime fused by
the same library into its own operators. Weights over 1 GiB lie beside the graph, in
`model.onnx_data`, the name that servers look for.
"""

import contextlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import onnx

EXTERNAL_BYTES: Final = 1 << 30
"""From this size on the weights lie in a file of their own; protobuf ends at 2 GiB."""
OPSET: Final = 21
MATRIX: Final = 2
PLACES: Final[Mapping[str, int]] = {"MatMul": 1, "FusedMatMul": 1, "Gemm": 1, "Gather": 0}
"""The place of a constant matrix among an operator's inputs."""
LONGEST: Final = 1 << 20

Provider = Literal["cpu", "cuda"]
"""An execution provider of ONNX Runtime."""

Axes = Mapping[str, Sequence[str]]
"""Input -> the names of its leading axes, "" for a fixed one.

Axes of the same name have the same size; a sum of names ("past_sequence + sequence") is found to be
one when the model is traced. The input `c` in the dict `b` in the dict `a` is `a.b.c`.
"""


def write(
    module: Any,
    inputs: Mapping[str, Any],
    *,
    axes: Axes,
    path: Path,
    fuse_for: Provider | None,
) -> None:
    """Trace a module and write its graph to `path`.

    Args:
        module: a model, or a module that calls one, in evaluation mode, in fp32, on the CPU.
        inputs: what its `forward` takes: tensors, and dicts of such. No dynamic axis may have the
            size 1: torch.export takes that for a constant.
        axes: the dynamic axes of every input.
        path: the file to write; its folder must be there.
        fuse_for: the provider whose own operators may be used; None keeps to the standard ones.
    """
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    longest = getattr(getattr(module, "config", None), "max_position_embeddings", None) or LONGEST
    dimensions = {
        name: torch.export.Dim.AUTO
        if "+" in name
        else torch.export.Dim(
            name, min=int(name != "past_sequence"), max=LONGEST if name == "batch" else longest
        )
        for named in axes.values()
        for name in named
        if name
    }
    options = OnnxConfig(
        dynamic=True,
        dynamic_shapes=_shapes(inputs, axes, dimensions),
        opset_version=OPSET,
        ort_fusions=fuse_for,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    with quiet():
        program = OnnxExporter().export(module, dict(inputs), config=options).program
        rename_axes(program, axes)
        widen_products(program)
        name_nodes(program, getattr(module, "called", module))
        strip(program)
        save(program, path)


def _shapes(inputs: Mapping[str, Any], axes: Axes, dimensions: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, given in inputs.items():
        if isinstance(given, Mapping):
            inner = {key.removeprefix(f"{name}."): named for key, named in axes.items()}
            found[name] = _shapes(given, inner, dimensions)
        else:
            found[name] = {at: dimensions[axis] for at, axis in enumerate(axes[name]) if axis}
    return found


def rename_axes(program: Any, axes: Axes) -> None:
    """Give the dynamic axes their names; the exporter calls them s18 and s41, and s18 + s41."""
    import onnx_ir

    names = {
        str(dimension): axis
        for value in program.graph.inputs
        for dimension, axis in zip(value.shape, axes.get(value.name, ()), strict=False)
        if not isinstance(dimension, int)
    }

    def named(symbol: re.Match[str]) -> str:
        return names.get(symbol[0], symbol[0])

    for graph in program.graphs():
        values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
        for value in values:
            if value.shape is not None and not value.shape.frozen:
                for at, dimension in enumerate(value.shape):
                    if not isinstance(dimension, int) and dimension.value is not None:
                        text = re.sub(r"\w+", named, str(dimension))
                        value.shape[at] = onnx_ir.SymbolicDim(text)


def name_nodes(program: Any, module: Any) -> None:
    """Name the nodes that read a constant matrix after the module that it comes from.

    A matrix that several modules were packed into has the name of the first; one that is none of
    the module's keeps its name. Only so can layers be left out of what is done to a graph later.
    """
    modules: dict[bytes, str] = {}
    for name, inner in module.named_modules():
        weight = getattr(inner, "weight", None)
        if weight is not None and weight.dim() == MATRIX and weight.numel():
            of_first_output = weight[:, 0] if "Conv1D" in type(inner).__name__ else weight[0]
            modules.setdefault(of_first_output.detach().cpu().numpy().tobytes(), name)
    given: Counter[str] = Counter()
    for node in program.graph:
        place = PLACES.get(node.op_type)
        if place is None:
            continue
        value, attribute = node.inputs[place], node.attributes.get("transB")
        rows = node.op_type == "Gather" or (attribute is not None and attribute.as_int())
        before = value.producer()
        if before is not None and before.op_type == "Transpose":
            value, rows = before.inputs[0], True
        constant = value.const_value
        if constant is None or len(constant.shape) != MATRIX or not constant.size:
            continue
        if node.op_type == "Gather":  # the first row may be padding, all zeros in several tables
            found = value.name.removesuffix(".weight").removeprefix("called.")
        else:
            array = constant.numpy()
            found = modules.get((array[0] if rows else array[:, 0]).tobytes())
        if found is not None:
            given[found] += 1
            node.name = found if given[found] == 1 else f"{found}.{given[found]}"


def widen_products(program: Any) -> None:
    """Compute products of bf16 in fp32 and round them, which gives the same.

    ONNX Runtime 1.31 has no bf16 product on the CPU, and Falcon makes its ALiBi slopes by one.
    """
    import onnx_ir

    narrow, wide = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT
    for graph in program.graphs():
        for node in list(graph):
            (old, *_) = node.outputs
            if node.op_type != "Mul" or old.dtype != narrow:
                continue
            given = [onnx_ir.node("Cast", [x], attributes={"to": wide}) for x in node.inputs]
            product = onnx_ir.node("Mul", [cast.outputs[0] for cast in given])
            rounded = onnx_ir.node("Cast", [product.outputs[0]], attributes={"to": narrow})
            new = [*given, product, rounded]
            onnx_ir.convenience.replace_nodes_and_values(
                graph, node, [node], new, [old], [rounded.outputs[0]]
            )


def strip(program: Any) -> None:
    """Take out what the exporter notes of itself: stack traces, with the paths of this machine."""
    program.metadata_props.clear()
    for graph in program.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


def save(program: Any, path: Path) -> None:
    """Write the graph, with its weights inside while they are under 1 GiB."""
    import onnx_ir

    size = sum(value.const_value.nbytes for value in program.graph.initializers.values())
    external = data_file(path).name if size >= EXTERNAL_BYTES else None
    onnx_ir.save(program, path, external_data=external)


def store(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph, its weights beside it from 1 GiB on."""
    external = graph.ByteSize() >= EXTERNAL_BYTES
    location = data_file(path).name if external else None
    onnx.save(graph, path, save_as_external_data=external, location=location)


def data_file(path: Path) -> Path:
    """Return where the weights of the graph at `path` lie when they are not inside."""
    return path.with_name(f"{path.name}_data")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the exporters of torch and transformers say of themselves at every export."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
