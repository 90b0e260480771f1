"""What a call takes without the copies to a device and back: a second column beside latencies.

By the same clock of the host, which is read when the device says that it has computed: what the
host takes to start the work is in it. The calls follow one another in a process of their own, so
that they say what copies cost, not which artifact is faster. On the CPU nothing is copied, and
nothing measured.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks import speed
from benchmarks.worker import Arrays, Worker
from exporters import onnx
from pipeline.openers import RESIDENT

CALLS: Final = 30
"""Of each load."""


def times_ms(
    runtime: str, source: Path, loads: Sequence[Arrays], *, device: str, threads: int
) -> list[float] | None:
    """Return the median milliseconds of each load, all of it being on the device and staying there.

    Args:
        runtime: see `openers`.
        source: an artifact's folder, or a graph.
        loads: the inputs.
        device: None comes back for the CPU, and for an encoder with its decoder in ONNX Runtime.
        threads: of the process that is opened.

    Raises:
        Unavailable: this machine lacks what opens it.
        WorkerError: it does not open, or ends, or hangs.
    """
    if device == "cpu":
        return None
    if runtime == "onnxruntime":
        source = source if source.is_file() else source / onnx.MODEL
        if len(onnx.files(source)) > 1:
            return None
    with Worker(RESIDENT[runtime], source, device=device, threads=threads) as worker:
        found = []
        for at, inputs in enumerate(loads):
            worker.hold(at, inputs)
            speed.warm_up(worker, at)
            found.append(median(worker.time(at, CALLS)) / 1e6)
        return found
