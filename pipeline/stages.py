"""The rows of the report: every artifact of a run, measured on the target.

From the baseline on, each artifact is measured alone (accuracy, memory, first call), then all of
them together (speed). A torch artifact whose target is ONNX Runtime is measured as its export, so
that a gain is the step's and not the runtime's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import metrics, speed
from benchmarks.outcomes import Outcomes, fidelity
from exporters import onnx, tensorrt
from pipeline import measuring, prices, steps
from pipeline.measuring import Alone, Bench
from pipeline.report import SAME, Load, Score, Stage, shape
from pipeline.settings import Export
from pipeline.store import Entry
from pipeline.work import Artifact, Work

NOTABLE: Final = 0.02
"""The smallest change of a ratio that counts as a gain."""


NOT_RUN: Final = (
    "the engine was built and not run: accuracy, speed and memory are those of the ONNX file that"
    " it was built from, in ONNX Runtime"
)
"""What is said of an engine whose target is not an engine's."""


@dataclass(frozen=True)
class Measured:
    """The stages from the baseline on, and the outcomes of the first and the last of them.

    `digest` is that of the last one's files, `pressure` how busy the machine was before and after
    the speed was measured.
    """

    stages: tuple[Stage, ...]
    baseline: Outcomes
    candidate: Outcomes
    digest: str
    pressure: dict[str, list[float | None]]


def measure(work: Work, artifacts: Sequence[Artifact], split: str = "gate") -> Measured:
    """Return the stages of a run's artifacts, the baseline first, by the examples of a split."""
    bench = prices.bench(work, split)
    running = [running_of(work, artifact) for artifact in artifacts]
    found = [measuring.alone(bench, entry.folder, entry.digest) for entry in running]
    together = measuring.together(bench, {entry.digest: entry.folder for entry in running})
    stages: list[Stage] = []
    for at, (artifact, entry, alone) in enumerate(zip(artifacts, running, found, strict=True)):
        digests = running[0].digest, running[max(at - 1, 0)].digest, entry.digest
        stage = replace(
            _stage(work, artifact, alone, found[0].outcomes),
            loads=_loads(bench, alone, together, digests),
        )
        stages.append(replace(stage, gain_note=_gain_note(stages[-1], stage)) if stages else stage)
    first, last = found[0].outcomes, found[-1].outcomes
    return Measured(tuple(stages), first, last, running[-1].digest, together.pressure)


def running_of(work: Work, artifact: Artifact) -> Entry:
    """Return what of an artifact runs in the target's runtime."""
    match work.recipe.target.runtime:
        case "onnxruntime":
            return artifact.graph or steps.export(work, artifact)
        case "tensorrt" if artifact.graph is None:
            last = work.recipe.steps[-1]
            assert isinstance(last, Export)
            return steps.engine(work, last, artifact)[0]
        case _:
            return artifact.entry


def _stage(work: Work, artifact: Artifact, alone: Alone, baseline: Outcomes) -> Stage:
    metric = metrics.METRICS[work.metric]
    right = None
    if metric.kind == "binary":
        right = lambda columns: np.asarray(metric.function(columns)) > 0  # noqa: E731
    about = artifact.entry.about
    details = dict(about["details"])
    if _not_run(artifact.format, work.recipe.target.runtime):
        details["measured"] = NOT_RUN
    return Stage(
        name=artifact.name,
        step=artifact.step,
        format=artifact.format,
        runtime=work.recipe.target.runtime,
        folder=str(artifact.entry.folder),
        seconds=about["seconds"],
        parameters=about["parameters"],
        size_bytes=size_bytes(artifact.entry.folder),
        score=Score(
            work.metric,
            metrics.score(work.metric, alone.outcomes.columns),
            len(alone.outcomes.ids),
            metric.higher_is_better,
        ),
        fidelity=fidelity(baseline, alone.outcomes, right),
        loads=(),
        memory={
            "peak_rss_bytes": alone.peak_rss_bytes,
            "import_floor_bytes": alone.import_floor_bytes,
            "device_peak_bytes": alone.device_bytes,
        },
        load_seconds=alone.load_seconds,
        heads=tuple(about["heads"]),
        neurons=tuple(about["neurons"]),
        kept_heads=tuple(tuple(kept) for kept in about["kept_heads"]),
        details=details,
    )


def _loads(
    bench: Bench, alone: Alone, together: measuring.Together, digests: tuple[str, str, str]
) -> tuple[Load, ...]:
    """Return the speed at every load; `digests` are of baseline, stage before, and this stage."""
    first, previous, this = (together.latencies[digest] for digest in digests)
    loads = []
    for at, (batch, sequence) in enumerate(bench.target.loads):
        calls = [call for turn in this[at] for call in turn]
        loads.append(
            Load(
                batch=batch,
                sequence=sequence if "sequence" in bench.task.axes else None,
                latency_ms=speed.percentiles(calls),
                first_call_ms=alone.first_call_ms[at],
                resident_ms=None if alone.resident_ms is None else alone.resident_ms[at],
                throughput_per_s=batch * 1e3 / float(np.mean(calls)),
                speedup=speed.ratio(first[at], this[at]),
                gain=speed.ratio(previous[at], this[at]),
                **_energy(together.joules, digests, at),
            )
        )
    return tuple(loads)


def _energy(
    joules: Mapping[str, list[list[float]]] | None, digests: tuple[str, str, str], at: int
) -> dict[str, Any]:
    """Return the energy of a call, and its ratio to the baseline's."""
    if joules is None:
        return {}
    before, after = ([[turn] for turn in joules[digest][at]] for digest in (digests[0], digests[2]))
    if not all(used > 0 for [used] in before + after):
        return {}  # a sensor that stood still
    return {"joules": float(np.median(after)), "energy": speed.ratio(after, before)}


def _gain_note(before: Stage, stage: Stage) -> str:
    """Say what a step gained over the stage before, or that it did not pay."""
    gains = [
        f"{load.gain.value:.2f}x faster at {shape(asdict(load))}"
        for load in stage.loads
        if load.gain.low > 1 + NOTABLE
    ]
    gains += [
        f"slower at {shape(asdict(load))}: {load.gain.value:.2f}x as fast"
        for load in stage.loads
        if load.gain.high < 1 - NOTABLE
    ]
    for what, now, then in (
        ("size", stage.size_bytes, before.size_bytes),
        ("peak memory", stage.memory["peak_rss_bytes"], before.memory["peak_rss_bytes"]),
    ):
        if now and then and now / then < 1 - NOTABLE:
            gains.append(f"{what} {now / then:.2f}x")
    trained = stage.step is not None and stage.step["step"] == "finetune"
    if trained:
        gains.append(f"{stage.score.metric} {stage.score.value - before.score.value:+.4f}")
    if stage.folder == before.folder:
        return SAME
    foreseen = _predicted(stage)
    note = ", ".join(gains) if gains else "no gain in latency, memory or size on this target"
    if _not_run(stage.format, stage.runtime):
        note += f"; {NOT_RUN}"
    return f"{note} ({foreseen})" if foreseen else note


def _predicted(stage: Stage) -> str | None:
    """Return what speedup a goal foresaw, if the step had a goal of time."""
    goal: Mapping[str, Any] = stage.details.get("goal", {})
    if "speedup" not in goal and "latency_ms" not in goal:
        return None
    speedup = stage.details["dense_cost"] / stage.details["predicted_cost"]
    both = ", of both models quantized" if goal.get("quantized") else ""
    return f"predicted{both}: {speedup:.2f}x faster"


def _not_run(artifact_format: str, runtime: str) -> bool:
    """Return whether what was measured of a stage is not what it made: an engine without a GPU."""
    return artifact_format == "tensorrt" and runtime != "tensorrt"


def size_bytes(folder: Path) -> int:
    """Return the bytes of the model's own files: weights, or graph and weights, or an engine."""
    if (folder / tensorrt.PLAN).is_file():
        return (folder / tensorrt.PLAN).stat().st_size
    weights = [*folder.glob("*.safetensors"), *(folder / onnx.MODEL.parent).glob("*model.onnx*")]
    return sum(path.stat().st_size for path in weights)
