"""Graphs whose inputs and outputs stay where they are computed: ONNX Runtime's IO binding.

On a GPU a plain call copies every input there and every output back. What need not travel is bound:
the cache between two tokens, and, to tell the device's time from that of the copies, everything.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporters import without_copies
from exporters.onnx.session import Arrays, feeder, open_session, runtime


def keeping_cache(
    path: Path, *, device: str, threads: int
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return a predictor whose cache never leaves the device.

    It is like `predictor` in all else, but for the outputs `present.*`, which are no arrays: they
    are there to be given back as `past_key_values.*`. For errors see `predictor`.
    """
    session = open_session(path, device=device, threads=threads)
    given = feeder({node.name: node.shape for node in session.get_inputs()})
    outputs = [output.name for output in session.get_outputs()]
    kept = runtime().OrtValue

    def predict(arrays: Mapping[str, Any]) -> dict[str, Any]:
        binding = session.io_binding()
        for name, value in given(arrays).items():
            if isinstance(value, kept):
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in outputs:
            binding.bind_output(name, device if _is_cache(name) else "cpu")
        session.run_with_iobinding(binding)
        found = zip(outputs, binding.get_outputs(), strict=True)
        binding.clear_binding_inputs()  # else an output may keep them, the cache before among them
        return {name: value if _is_cache(name) else value.numpy() for name, value in found}

    return predict


def _is_cache(name: str) -> bool:
    return name.startswith("present.")


def resident(path: Path, *, device: str, threads: int) -> Callable[[Arrays], Arrays]:
    """Return a predictor that copies nothing back, see `without_copies`; errors of `predictor`."""
    session = open_session(path, device=device, threads=threads)
    given = feeder({node.name: node.shape for node in session.get_inputs()})
    kept = runtime().OrtValue

    def put(arrays: Arrays) -> Any:
        binding = session.io_binding()
        for name, array in given(arrays).items():
            there = kept.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
            binding.bind_ortvalue_input(name, there)
        for output in session.get_outputs():
            binding.bind_output(output.name, device)
        return binding

    def compute(binding: Any) -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return without_copies(put, compute)
