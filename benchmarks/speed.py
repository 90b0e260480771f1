"""How fast predictors are, compared fairly.

All artifacts are open at once, each in its own process, and take turns: A B C, C B A, A B C ... A
machine that slows down slows all of them, so the ratio of two artifacts within a round is steady
where their latencies are not. The ratio is the median over the rounds, its interval the order
statistics of the rounds, exact and free of any distribution.

R rounds.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import quantile_test

from benchmarks.accuracy import Track, silent
from benchmarks.worker import Arrays, Worker

CONFIDENCE: Final = 0.95
REWARMED: Final = 1
"""Calls at the start of a turn that are not counted: the caches hold another model's weights."""
COUNTED: Final = 2
"""Calls of a turn that are counted."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of latencies with its interval at `CONFIDENCE`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Percentiles:
    """Latency percentiles; None where the samples are too few for an upper confidence bound."""

    p50: float
    p90: float | None
    p95: float | None
    p99: float | None
    samples: int
    intervals: Mapping[str, tuple[float | None, float | None]]
    """Of every percentile that is known; an end is None where the samples are too few for it."""


def compare(
    workers: Mapping[str, Worker],
    loads: Sequence[Arrays],
    *,
    rounds: int,
    seconds: float,
    track: Track = silent,
) -> dict[str, list[list[list[float]]]]:
    """Return latencies in milliseconds: artifact -> load -> round -> counted calls.

    A load ends after `rounds` rounds, or after `seconds` but not before 6 rounds, the fewest that
    bound a median at 95 %.
    """
    found: dict[str, list[list[list[float]]]] = {name: [] for name in workers}
    for load, inputs in enumerate(loads):
        for name, worker in workers.items():
            worker.hold(load, inputs)
            found[name].append([])
            _warm_up(worker, load)
        deadline = time.monotonic() + seconds
        order = list(workers)
        for count in track(range(rounds), f"timing load {load + 1} of {len(loads)}", rounds):
            if count >= 6 and time.monotonic() > deadline:  # noqa: PLR2004 - see the docstring
                break
            for name in order:
                latencies = workers[name].time(load, REWARMED + COUNTED)[REWARMED:]
                found[name][load].append([ns / 1e6 for ns in latencies])
            order.reverse()
    return found


def _warm_up(worker: Worker, load: int, most: int = 20) -> None:
    """Call until a call is no faster than the ones before it by more than a tenth."""
    before = worker.time(load, 2)[-1]
    for _ in range(most):
        now = worker.time(load, 1)[0]
        if now > 0.9 * before:
            return
        before = now


def first_call_ms(worker: Worker, inputs: Arrays) -> float:
    """Return the latency of the first call at an input shape, in milliseconds."""
    worker.hold(0, inputs)
    return worker.time(0, 1)[0] / 1e6


def ratio(baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> Ratio:
    """Return how many times faster the candidate is: median over the rounds, with its interval.

    Raises:
        ValueError: the two did not take turns in the same rounds.
    """
    if len(baseline) != len(candidate) or not baseline:
        raise ValueError(
            f"ratio: found {len(baseline)} and {len(candidate)} rounds, expected equal"
        )
    ratios = np.mean(baseline, axis=1) / np.mean(candidate, axis=1)
    interval = quantile_test(ratios, p=0.5).confidence_interval(CONFIDENCE)
    return Ratio(float(np.median(ratios)), float(interval.low), float(interval.high))


def percentiles(latencies: Sequence[float]) -> Percentiles:
    """Return the percentiles for which the samples give an upper bound at `CONFIDENCE`.

    The bound is an order statistic, so p90 needs 29 samples, p95 59, p99 299.
    """

    def known(p: float) -> float | None:
        bound = quantile_test(latencies, p=p, alternative="less").confidence_interval(CONFIDENCE)
        return float(np.quantile(latencies, p)) if np.isfinite(bound.high) else None

    def interval(p: float) -> tuple[float | None, float | None]:
        bounds = quantile_test(latencies, p=p).confidence_interval(CONFIDENCE)
        low, high = (float(end) if np.isfinite(end) else None for end in bounds)
        return low, high

    shares = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
    values = {name: known(share) for name, share in shares.items()}
    return Percentiles(
        p50=float(np.median(latencies)),
        p90=values["p90"],
        p95=values["p95"],
        p99=values["p99"],
        samples=len(latencies),
        intervals={n: interval(p) for n, p in shares.items() if n == "p50" or values[n]},
    )
