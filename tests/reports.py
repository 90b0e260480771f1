"""Reports as runs write them, made up, for the tests of what is drawn of them."""

import json
from dataclasses import asdict, replace
from typing import Any

from benchmarks.figures import Percentiles, Ratio
from benchmarks.machine import Machine
from benchmarks.outcomes import Fidelity, Spread
from pipeline.report import Check, Load, Report, Score, Stage, Verdict

HEADS, NEURONS, LAYERS = 12, 1536, 6
FULL = (tuple(range(HEADS)),) * LAYERS
CUT = (
    (0, 1, 2, 5, 6, 8, 11),
    (1, 2, 3, 4, 7, 9),
    (0, 3),
    (0, 1, 4, 6, 7, 8, 9, 10, 11),
    (2, 5, 8),
    FULL[0],
)


def ratio(value: float, spread: float = 0.04) -> Ratio:
    return Ratio(value, value * (1 - spread), value * (1 + spread))


def load(batch: int, sequence: int | None, ms: float, base: float, before: float) -> Load:
    intervals = {"p50": (ms * 0.98, ms * 1.02), "p90": (ms * 1.05, None)}
    quantiles = tuple(ms * (1 + (at - 10) ** 3 / 9000) for at in range(21))
    latency = Percentiles(ms, ms * 1.07, ms * 1.1, None, 60, 23.0, intervals, quantiles)
    speedup, gain = (ratio(other / ms, 0.04 * (other != ms)) for other in (base, before))
    return Load(batch, sequence, latency, ms * 9, batch * 1e3 / ms, speedup, gain)


def scored() -> dict[str, Any]:
    """Return what a prune step says of the heads that it scored: the more so the later."""
    paths = [f"bert.encoder.layer.{at}.attention" for at in range(LAYERS)]
    return {
        "scores": {p: [at + head / 100 for head in FULL[at]] for at, p in enumerate(paths)},
        "scored": {p: list(FULL[at]) for at, p in enumerate(paths)},
        "removed": {p: sorted({*FULL[at]} - {*CUT[at]}) for at, p in enumerate(paths)},
    }


def stages(
    names: list[str],
    metric: str,
    scores: list[float],
    times: list[float],
    shapes: list[tuple[int, int | None]],
) -> tuple[Stage, ...]:
    """Return stages of which those from the second on have lost heads and neurons."""
    found = []
    steps: dict[str, dict[str, Any]] = {
        "prune": {
            "step": "prune",
            "heads": 0.4,
            "neurons": 0.5,
            "criterion": "importance",
        },
        "finetune": {"step": "finetune", "epochs": 1.0, "teacher": "original"},
        "quantize": {"step": "quantize", "method": "int8-dynamic", "embeddings": False},
        "export": {"step": "export", "format": "onnx"},
    }
    for at, (name, score, ms) in enumerate(zip(names, scores, times, strict=True)):
        binary = metric == "accuracy"
        heads = CUT if at else FULL
        neurons = (700, 800, 400, 1100, 608, 1000) if at else (NEURONS,) * LAYERS
        found.append(
            Stage(
                name=name,
                step=steps.get(name.partition("-")[0]) if at else None,
                format="onnx" if at > 2 else "torch",
                runtime="onnxruntime",
                folder=f"runs/demo/{at}-{name}",
                seconds=12.5 * at,
                parameters=22_713_986 - 5_900_000 * bool(at),
                size_bytes=[90_868_376, 67_000_000, 67_000_000, 24_500_000, 24_100_000][at],
                score=Score(metric, score, 2000, metric != "perplexity"),
                fidelity=Fidelity(
                    1.0 - 0.013 * at, 31 * at, 0.01 * at, 20 * at, 11 * at, 0.1, 0.8, 0.1
                )
                if binary
                else Fidelity(
                    1.0 - 0.013 * at,
                    None,
                    None,
                    perplexities=Spread(score * 0.6, score, score * 1.9),
                    perplexity_ratios=Spread(0.97, score / scores[0], 1.61),
                ),
                loads=tuple(
                    load(
                        b,
                        s,
                        ms * b**0.9,
                        times[0] * b**0.9,
                        times[max(at - 1, 0)] * b**0.9,
                    )
                    for b, s in shapes
                ),
                memory={
                    "peak_rss_bytes": 512_000_000 - 61_000_000 * at,
                    "import_floor_bytes": 190_000_000,
                    "device_peak_bytes": None,
                },
                load_seconds=0.4,
                heads=tuple(map(len, heads)),
                neurons=neurons,
                kept_heads=heads,
                details=scored() if name == "prune" else {},
                gain_note=""
                if not at
                else "1.42 times as fast (1.36-1.48)"
                if at < 4
                else "does not pay: no gain in latency, memory or size",
            )
        )
    return tuple(found)


def report(
    checks: tuple[Check, ...], outcome: Any, found: tuple[Stage, ...], **budget: float
) -> Report:
    machine = Machine(
        system="Linux-6.1.0-x86_64-with-glibc2.36",
        cpu="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        cpu_flags=("avx2", "avx512f", "avx512_vnni", "amx_int8"),
        cores=2,
        memory_bytes=8_340_000_000,
        gpu=None,
        python="3.11.2",
        versions={"torch": "2.13.0", "transformers": "5.23.0", "onnxruntime": "1.31.0"},
    )
    recipe = {
        "model": {"source": "sentence-transformers/all-MiniLM-L6-v2", "revision": None},
        "task": {
            "kind": "text-classification",
            "data": "glue",
            "subset": "sst2",
            "splits": {"gate": "validation"},
        },
        "target": {
            "device": "cpu",
            "runtime": "onnxruntime",
            "threads": 2,
            "loads": [{"batch": 1, "sequence": 128}],
        },
        "steps": [stage.step for stage in found[1:]],
        "budget": budget,
    }
    data = {
        "source": "glue/sst2",
        "fingerprints": {"train": "1" * 64, "gate": "2" * 64},
        "examples": {"train": 8000, "calibration": 512, "selection": 0, "gate": 2000},
    }
    verdict = Verdict(outcome, checks)
    return Report(recipe, asdict(machine), data, found[0].name, found, verdict, found[-1].folder)


def passed() -> Report:
    found = stages(
        ["original", "prune", "finetune", "quantize", "export"],
        "accuracy",
        [0.9105, 0.8710, 0.9060, 0.9025, 0.9025],
        [9.1, 6.2, 6.15, 3.9, 3.85],
        [(1, 128), (8, 128)],
    )
    checks = (
        Check("accuracy drop", 0.02, 0.008, 0.0021, 0.0142, "pass"),
        Check("speedup at 1x128", 1.5, 2.36, 2.21, 2.49, "pass", at_least=True),
        Check("speedup at 8x128", 1.5, 2.36, 2.25, 2.44, "pass", at_least=True),
        Check("size", 0.4, 0.265, 0.265, 0.265, "pass"),
    )
    return report(checks, "pass", found, max_drop=0.02, min_speedup=1.5, max_size=0.4)


def inconclusive() -> Report:
    found = stages(
        ["original", "prune", "finetune", "quantize"],
        "perplexity",
        [24.11, 31.7, 25.3, 25.4],
        [41, 30, 30.1, 22],
        [(1, 64), (4, 64), (16, 64)],
    )
    note = "about 412 more examples would decide, if the estimate holds"
    check = Check("perplexity ratio", 1.06, 1.0535, 1.041, 1.066, "inconclusive", note)
    return report((check,), "inconclusive", found, max_perplexity_ratio=1.06)


def failed() -> Report:
    found = stages(
        ["original", "prune", "quantize"],
        "accuracy",
        [0.81, 0.74, 0.72],
        [55, 40, 43],
        [(1, None)],
    )
    checks = (
        Check("accuracy drop", 0.01, 0.09, 0.071, 0.108, "fail"),
        Check("memory", 0.8, 0.761, 0.761, 0.761, "pass"),
    )
    found = tuple(
        replace(
            s, kept_heads=FULL, neurons=(NEURONS,) * LAYERS, heads=(HEADS,) * LAYERS, details={}
        )
        for s in found
    )
    return report(checks, "fail", found, max_drop=0.01)


def content(sample: Report) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sample.to_json())
    return found


SAMPLES = {"pass": passed, "inconclusive": inconclusive, "fail": failed}
