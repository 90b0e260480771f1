"""`bench`: artifacts of any format beside one another, and which is faster.

All are open at once, each in a process of its own, and take turns; see speed.py. A ratio is to the
first artifact, and is measured until its interval is narrow enough or the time is over. What cannot
be known here is None, with the reason beside it where it is not the machine's.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, Final

import numpy as np

from benchmarks import limits, loadgen, machine, speed
from benchmarks.accuracy import Track, silent
from benchmarks.machine import Unavailable
from exporters.onnx import counting
from pipeline import candidates, measuring, on_device, openers
from pipeline.candidates import Candidate
from pipeline.turns import SCENARIOS, Bench, Results, Settings, sensors

SCHEMA: Final = 1


def bench(paths: Sequence[Path], settings: Settings, track: Track = silent) -> dict[str, Any]:
    """Return what was measured of the artifacts at these paths, as JSON.

    Raises:
        ModelError, DataError: an artifact or the text is not what was expected.
        Unavailable, NotHere, MissingDependency: this machine lacks what it takes.
        WorkerError: an artifact does not open, or ends, or hangs.
    """
    find = candidates.generator if settings.scenario == "generation" else candidates.find
    found = [find(path, settings.device) for path in paths]
    for each in found:
        openers.check(each.runtime, settings.device, "--device")
    return compare(found, settings, track)


def compare(
    artifacts: Sequence[Candidate], settings: Settings, track: Track = silent
) -> dict[str, Any]:
    """Return what was measured of artifacts, as JSON; for what it raises see `bench`."""
    if settings.threads > machine.usable_cores():
        raise Unavailable(
            f"--threads: found {settings.threads}, expected at most {machine.usable_cores()}, the"
            " cores that are usable here"
        )
    if settings.loadgen:
        loadgen.available(settings.scenario)
    found = _named(artifacts)
    lines = candidates.texts(settings.text)
    inputs = {
        name: [candidates.inputs(each, lines, *load) for load in settings.loads]
        for name, each in found.items()
    }
    if settings.scenario == "generation":
        many = {"new_tokens": np.asarray(settings.new_tokens)}
        inputs = {name: [given | many for given in each] for name, each in inputs.items()}
    this = Bench(found, inputs, settings, track)
    alone = {name: _alone(this, name) for name in found}
    before, start = machine.stalled_seconds(), monotonic()
    results = SCENARIOS[settings.scenario](this)
    passed, after = monotonic() - start, machine.stalled_seconds()
    stalled = {
        what: None if seconds is None else ((after[what] or 0) - seconds) / passed
        for what, seconds in before.items()
    }
    counted = settings.scenario in {"single-stream", "multi-stream"}
    if counted:
        _add_limits(this, results)
        _add_device_times(this, results)
    return {
        "schema": SCHEMA,
        "settings": asdict(settings) | {"text": settings.text and str(settings.text)},
        "machine": asdict(machine.describe()) | {"stalled": stalled},
        "no_watts": sensors(settings)[1],
        "no_device_bytes": measuring.no_device_bytes(settings.device),
        "artifacts": [
            _about(this, name) | alone[name] | {"results": results[name]} for name in found
        ],
    }


def _named(found: Sequence[Candidate]) -> dict[str, Candidate]:
    """Return the artifacts by name, numbered where two have the same."""
    names = [each.name for each in found]
    numbers = [names[:at].count(name) + 1 for at, name in enumerate(names)]
    return {
        name if names.count(name) == 1 else f"{name} #{number}": each
        for name, number, each in zip(names, numbers, found, strict=True)
    }


def _about(this: Bench, name: str) -> dict[str, Any]:
    candidate = this.found[name]
    return {
        "name": name,
        "source": str(candidate.source),
        "runtime": candidate.runtime,
        "size_bytes": candidate.size_bytes,
        "parameters": candidates.parameters(candidate),
    }


def _alone(this: Bench, name: str) -> dict[str, Any]:
    """Return what a fresh process took to open the artifact and to answer each load once."""
    with this.open(this.found[name], this.settings.threads) as worker:
        first = [speed.first_call_ms(worker, given) for given in this.inputs[name]]
        return {
            "load_seconds": worker.load_seconds,
            "first_call_ms": first,
            "import_floor_bytes": worker.import_floor_bytes,
            "peak_rss_bytes": worker.peak_rss_bytes(),
            "device_bytes": worker.device_bytes(),
        }


def _add_device_times(this: Bench, results: Results) -> None:
    """Add what a call takes without copies, on a device; and the nodes that are left to the CPU."""
    settings = this.settings
    for name, each in this.found.items():
        given = this.inputs[name]
        place = each.graph or each.source
        times = on_device.times_ms(
            each.runtime, place, given, device=settings.device, threads=settings.threads
        )
        for at, result in enumerate(results[name]):
            result["resident_ms"] = None if times is None else times[at]
            if times is not None and each.graph is not None:
                result["nodes"] = counting.providers(each.graph, given[at], settings.device)


def _add_limits(this: Bench, results: Results) -> None:
    """Add the multiply-adds of every load, and how near the machine's limits its speed came.

    `compute` is the share of its time that they would take at the highest rate at which this
    machine multiplies, `weights` the share that reading the weights once would take.
    """
    settings = this.settings
    counts = {
        name: [
            candidates.multiply_adds(each, given, settings.device) for given in this.inputs[name]
        ]
        for name, each in this.found.items()
    }
    kinds = {kind for each in counts.values() for count, _ in each for kind in count or ()}
    most = limits.measure(kinds, device=settings.device, threads=settings.threads)
    for name, candidate in this.found.items():
        for result, (count, reason) in zip(results[name], counts[name], strict=True):
            result["multiply_adds"], result["reason"] = count, reason
            result["limit"] = None
            if count is None:
                continue
            if unknown := count.keys() - most.multiply_adds_per_s.keys():
                result["reason"] = f"the peak rate of {', '.join(sorted(unknown))} is not measured"
                continue
            seconds = result["latency_ms"]["p50"] / 1e3
            least = sum(each / most.multiply_adds_per_s[kind] for kind, each in count.items())
            read = candidates.bytes_read(candidate) / most.bytes_per_s
            result["limit"] = {"compute": least / seconds, "weights": read / seconds}
