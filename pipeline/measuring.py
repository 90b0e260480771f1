"""Every artifact measured on the target, through the store.

An artifact is opened in a fresh process twice: once for accuracy, memory and the first call, once
beside all the others, for speed. What was measured is an entry of the store like any stage, keyed
by the artifact's content, the data, the target and the machine, so that nothing is measured twice.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import energy, machine, nvidia, speed
from benchmarks.accuracy import Track, evaluate
from benchmarks.examples import Arrays, Example
from benchmarks.outcomes import Outcomes
from benchmarks.tasks import Task
from benchmarks.worker import Worker
from exporters import tensorrt
from pipeline import on_device
from pipeline.openers import OPENERS
from pipeline.store import Store


@dataclass(frozen=True)
class Target:
    """Where artifacts are measured, with the number of threads settled."""

    device: str
    runtime: str
    threads: int
    loads: tuple[tuple[int, int], ...]
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Bench:
    """What measuring needs: the store, the target, and examples of the task.

    `evidence` is the fingerprint of the examples, `code` that of the code that measures.
    """

    store: Store
    target: Target
    machine: machine.Machine
    task: Task
    examples: Sequence[Example]
    padding: dict[str, int]
    evidence: str
    code: str
    track: Track


def no_device_bytes(device: str) -> str:
    """Return why the memory of the device is not known, nothing if it is."""
    return nvidia.used_bytes()[1] if device == "cuda" else "a CPU has none beside the process's"


def reasons(device: str) -> dict[str, str]:
    """Return why figures may be None on a device, by their names in a report."""
    cpu = device == "cpu"
    return {
        "device_peak_bytes": no_device_bytes(device),
        "resident_ms": "nothing is copied on the CPU" if cpu else "not of a model in two graphs",
        "joules": energy.counters(device)[1],
    }


@dataclass(frozen=True)
class Alone:
    """What was measured of one artifact by itself; `resident_ms`, by load, of on_device.py."""

    outcomes: Outcomes
    load_seconds: float
    import_floor_bytes: int
    peak_rss_bytes: int
    device_bytes: int | None
    first_call_ms: list[float]
    resident_ms: list[float] | None


def alone(bench: Bench, folder: Path, digest: str) -> Alone:
    """Return accuracy, memory and first calls of the artifact in `folder`."""

    def make(target: Path) -> dict[str, Any]:
        with open_worker(bench, folder) as worker:
            first = [speed.first_call_ms(worker, load) for load in loads(bench)]
            # Before the evaluation, whose batches are not the target's loads.
            peak, used = worker.peak_rss_bytes(), worker.device_bytes()
            outcomes = evaluate(worker, bench.task, bench.examples, bench.padding, bench.track)
            outcomes.save(target / "outcomes.safetensors")
            about = {
                "load_seconds": worker.load_seconds,
                "import_floor_bytes": worker.import_floor_bytes,
                "peak_rss_bytes": peak,
                "device_bytes": used,
                "first_call_ms": first,
            }
        where = bench.target
        times = on_device.times_ms(
            where.runtime, folder, loads(bench), device=where.device, threads=where.threads
        )
        return about | {"resident_ms": times}

    key = _key(bench) | {"artifact": digest, "evidence": bench.evidence}
    entry = bench.store.get("measured", key, make)
    return Alone(outcomes=Outcomes.load(entry.folder / "outcomes.safetensors"), **entry.about)


Latencies = Mapping[str, list[list[list[float]]]]
"""Milliseconds: digest of an artifact -> load -> round -> counted calls."""


@dataclass(frozen=True)
class Together:
    """Latencies of all artifacts, and how busy the machine was before and after.

    `joules` are those of a call, None without a sensor: digest -> load -> round.
    """

    latencies: Latencies
    joules: Mapping[str, list[list[float]]] | None
    pressure: dict[str, list[float | None]]


def together(bench: Bench, folders: Mapping[str, Path]) -> Together:
    """Return the latencies of all artifacts, by digest, from one interleaved run."""
    counters, _ = energy.counters(bench.target.device)

    def make(_: Path) -> dict[str, Any]:
        with ExitStack() as stack:
            workers = {
                digest: stack.enter_context(open_worker(bench, folder))
                for digest, folder in folders.items()
            }
            before = machine.pressure()
            latencies = speed.compare(
                workers,
                loads(bench),
                rounds=bench.target.rounds,
                seconds=bench.target.seconds,
                track=bench.track,
            )
            after = machine.pressure()
            joules = None
            if counters:
                joules = speed.energies(workers, len(bench.target.loads), counters, bench.track)
        pressure = {f"{name}_before_and_after": [before[name], after[name]] for name in before}
        return {
            "latencies": latencies,
            "joules": joules,
            "pressure": pressure,
        }

    key = _key(bench) | {"artifacts": list(folders), "inputs": bench.evidence}
    key["metered"] = bool(counters)
    return Together(**bench.store.get("timed", key, make).about)


def loads(bench: Bench) -> list[Arrays]:
    """Return the inputs of every load: real inputs of the task, full to the last token."""
    windows = [window.inputs for example in bench.examples for window in example.windows]
    if "sequence" not in bench.task.axes:
        return [_rows(windows, batch) for batch, _ in bench.target.loads]
    return [_tokens(windows, batch, length) for batch, length in bench.target.loads]


def _rows(windows: Sequence[Arrays], batch: int) -> Arrays:
    chosen = [windows[at % len(windows)] for at in range(batch)]
    return {name: np.stack([window[name] for window in chosen]) for name in chosen[0]}


def _tokens(windows: Sequence[Arrays], batch: int, length: int) -> Arrays:
    """Return `batch` rows of `length` tokens of the task's texts, put one behind the other.

    A decoder beside an encoder reads as many tokens as the median target has, all at once.
    """
    inputs = {name: np.zeros((batch, length), np.int64) for name in windows[0]}
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:
            texts = [window[name] for window in windows]
            longest = length if name == "input_ids" else int(np.median([len(t) for t in texts]))
            inputs[name] = np.resize(np.concatenate(texts), (batch, longest))
    inputs["attention_mask"] = np.ones((batch, length), np.int64)
    return inputs


def open_worker(bench: Bench, folder: Path) -> Worker:
    """Return a fresh process with the artifact of a folder open in the target's runtime.

    Raises:
        NotHere: the artifact is an engine, and for another GPU or version.
    """
    target = bench.target
    opener = OPENERS[target.runtime]
    if target.runtime == "tensorrt":
        tensorrt.check(folder)  # here it is said what is missing; a worker could only fail
    return Worker(opener, folder, device=target.device, threads=target.threads)


def _key(bench: Bench) -> dict[str, Any]:
    return {"target": asdict(bench.target), "machine": bench.machine.identity(), "code": bench.code}
