"""A model repository for NVIDIA's Triton Inference Server.

A folder a graph, named after the model: `NAME/config.pbtxt` and `NAME/1/model.onnx`. The files are
copied, since the server follows neither a link nor a path out of the repository.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_repository.html
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import onnx

from exporters.onnx.graph import data_file

TYPES: Final = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
}


def write(path: Path, repository: Path, name: str, *, device: str, threads: int, rows: int) -> None:
    """Put the graph at `path` into a model repository.

    Args:
        path: the graph; weights beside it come along, under the name that the graph knows.
        repository: the folder of all models.
        name: of this one.
        device: "cpu" or "cuda".
        threads: inside an operator.
        rows: of a batch at most.
    """
    version = repository / name / "1"
    version.mkdir(parents=True)
    shutil.copyfile(path, version / "model.onnx")
    if data_file(path).exists():
        shutil.copyfile(data_file(path), version / data_file(path).name)
    graph = onnx.load(path, load_external_data=False).graph
    kind = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}[device]
    count = f"{{ string_value: {json.dumps(str(threads))} }}"
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {rows}",
        *(_tensor("input", value) for value in graph.input),
        *(_tensor("output", value) for value in graph.output),
        f"instance_group [{{ count: 1, kind: {kind} }}]",
        f'parameters {{ key: "intra_op_thread_count" value: {count} }}',
    ]
    (repository / name / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tensor(kind: str, value: Any) -> str:
    given = value.type.tensor_type
    sizes: Sequence[int] = [d.dim_value or -1 for d in given.shape.dim][1:]  # but the batch
    what = f"name: {json.dumps(value.name)}, data_type: {TYPES[given.elem_type]}, dims: {sizes}"
    return f"{kind} [{{ {what} }}]"
