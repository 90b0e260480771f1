"""What this machine can do at most: multiply-adds a second, and bytes read from memory a second.

Measured, not looked up: a product of two large matrices, the fastest of many, in the library and
precision that artifacts use, and a product of a vector with a matrix that no cache holds. Each is a
predictor like any artifact, so that a worker measures it with the same threads and clock.

    Worker("benchmarks.limits:products", Path("int8"), device="cpu", threads=2)
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.worker import Arrays, Predictor, Worker

SIZES: Final = (512, 1024)
"""Sides of the square matrices; which one suits the caches best differs between machines."""
READ: Final = 8192
"""Side of the matrix that is read: 256 MB, more than the caches of a machine."""
CALLS: Final = 20
MEASURED: Final[Mapping[str, frozenset[str]]] = {
    "cpu": frozenset({"fp32", "int8"}),
    "cuda": frozenset({"fp32", "fp16", "bf16"}),
}
"""The precisions in which products are measured, by device."""


@dataclass(frozen=True)
class Limits:
    """The most that was reached: `multiply_adds_per_s` by precision, `bytes_per_s` read."""

    multiply_adds_per_s: Mapping[str, float]
    bytes_per_s: float


def measure(precisions: Iterable[str], *, device: str, threads: int) -> Limits:
    """Return the limits of this machine, at those of the precisions that are `MEASURED`."""
    rates = {}
    for precision in sorted(MEASURED[device].intersection(precisions)):
        with Worker(
            f"{__name__}:products", Path(precision), device=device, threads=threads
        ) as worker:
            rates[precision] = max(
                side**3 / _fastest(worker, at, np.zeros(side)) for at, side in enumerate(SIZES)
            )
    with Worker(f"{__name__}:reads", Path("fp32"), device=device, threads=threads) as worker:
        return Limits(rates, 4 * READ**2 / _fastest(worker, 0, np.zeros(1)))


def _fastest(worker: Worker, load: int, inputs: np.ndarray[Any, Any]) -> float:
    worker.hold(load, {"side": inputs})
    return min(worker.time(load, CALLS)) / 1e9


def products(precision: Path, *, device: str, threads: int) -> Predictor:
    """Return a predictor that multiplies two square matrices, as large as its input is long."""
    if device == "cuda":
        return _on_cuda(precision.name)
    return _on_cpu(precision.name, threads)


def reads(precision: Path, *, device: str, threads: int) -> Predictor:
    """Return a predictor that reads a matrix once."""
    del precision, threads  # numpy takes them from the environment that the worker sets
    if device == "cuda":
        import torch

        table, row = torch.ones(READ, READ, device=device), torch.ones(READ, device=device)
        return _synchronised(lambda _: table @ row)
    matrix, vector = np.ones((READ, READ), np.float32), np.ones(READ, np.float32)
    return lambda _: {"y": matrix @ vector}


def _on_cpu(precision: str, threads: int) -> Predictor:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    kinds = {
        "fp32": ("MatMul", np.float32, np.float32, TensorProto.FLOAT, TensorProto.FLOAT),
        "int8": ("MatMulInteger", np.uint8, np.int8, TensorProto.UINT8, TensorProto.INT32),
    }
    operator, left, right, given, result = kinds[precision]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions = {}
    for side in SIZES:
        info, shape = helper.make_tensor_value_info, [side, side]
        graph = helper.make_graph(
            [helper.make_node(operator, ["x", "w"], ["y"])],
            "product",
            [info("x", given, shape)],
            [info("y", result, shape)],
            [numpy_helper.from_array(np.ones(shape, right), "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        sessions[side] = session, np.ones(shape, left)

    def predict(inputs: Arrays) -> Arrays:
        session, x = sessions[len(inputs["side"])]
        return {"y": session.run(None, {"x": x})[0]}

    return predict


def _on_cuda(precision: str) -> Predictor:
    import torch

    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    tables = {side: torch.ones(side, side, device="cuda", dtype=kinds[precision]) for side in SIZES}
    return _synchronised(lambda inputs: tables[len(inputs["side"])] @ tables[len(inputs["side"])])


def _synchronised(act: Callable[[Arrays], Any]) -> Predictor:
    import torch

    def predict(inputs: Arrays) -> Arrays:
        act(inputs)
        torch.cuda.synchronize()
        return {}

    return predict
