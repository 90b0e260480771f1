"""How fast predictors are, compared fairly.

All artifacts are open at once, each in its own process, and take turns: A B C, C B A, A B C ... A
machine that slows down slows all of them, so the ratio of two artifacts within a round is steady
where their latencies are not. The ratio is the median over the rounds, its interval the order
statistics of the rounds, exact and free of any distribution.

R rounds.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, TypeVar

import numpy as np
from scipy.stats import quantile_test

from benchmarks.accuracy import Track, silent
from benchmarks.worker import Arrays, Worker

CONFIDENCE: Final = 0.95
REWARMED: Final = 1
"""Calls at the start of a turn that are not counted: the caches hold another model's weights."""
COUNTED: Final = 2
"""Calls of a turn that are counted."""
FEWEST: Final = 6
"""Rounds below which there is no interval of a median at `CONFIDENCE`."""

T = TypeVar("T")
Turns = list[list[float]]
"""Latencies in milliseconds: turn -> call."""
Speed = Literal["faster", "slower", "same", "undecided"]


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


def compare(
    workers: Mapping[str, Worker],
    loads: Sequence[Arrays],
    *,
    rounds: int,
    seconds: float,
    track: Track = silent,
) -> dict[str, list[Turns]]:
    """Return latencies in milliseconds: artifact -> load -> turns; see `interleave`."""
    found: dict[str, list[Turns]] = {name: [] for name in workers}
    for load, inputs in enumerate(loads):
        for worker in workers.values():
            worker.hold(load, inputs)
            warm_up(worker, load)
        turns = interleave(
            workers,
            partial(turn, load),
            rounds=rounds,
            seconds=seconds,
            track=track,
            what=f"timing load {load + 1} of {len(loads)}",
        )
        for name in workers:
            found[name].append(turns[name])
    return found


def turn(load: int, worker: Worker) -> list[float]:
    """Return the latencies of one turn of a worker on a held batch, in milliseconds."""
    return [ns / 1e6 for ns in worker.time(load, REWARMED + COUNTED)[REWARMED:]]


def interleave(
    artifacts: Mapping[str, T],
    turn: Callable[[T], list[float]],
    *,
    rounds: int,
    seconds: float,
    precision: float | None = None,
    track: Track = silent,
    what: str = "timing",
) -> dict[str, Turns]:
    """Return what each artifact gave in each of its turns.

    It ends after `rounds` rounds, or after `seconds`, or when every ratio to the first artifact is
    known to `precision`, but not before 6 rounds, the fewest that bound a median at 95 %.

    Args:
        artifacts: whose turns they are, by name.
        turn: takes one, and returns its latencies in milliseconds.
        rounds: at most.
        seconds: at most; a round is ended.
        precision: half of a ratio's interval, as a share of the ratio.
        track: shows progress.
        what: that is shown.
    """
    found: dict[str, Turns] = {name: [] for name in artifacts}
    deadline = time.monotonic() + seconds
    order = list(artifacts)
    for count in track(range(rounds), what, rounds):
        if count >= FEWEST and (time.monotonic() > deadline or _precise(found, precision)):
            break
        for name in order:
            found[name].append(turn(artifacts[name]))
        order.reverse()
    return found


def _precise(found: Mapping[str, Turns], precision: float | None) -> bool:
    first, *others = found.values()
    if precision is None or not others:
        return False
    ratios = [ratio(first, other) for other in others]
    return all((each.high - each.low) / 2 <= precision * each.value for each in ratios)


def warm_up(worker: Worker, load: int, most: int = 20) -> None:
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


def verdict(found: Ratio, noise: float) -> Speed:
    """Return what a ratio says, if differences of up to `noise` do not matter.

    The whole interval must lie beyond that difference, or within it.
    """
    if found.low > 1 + noise:
        return "faster"
    if found.high < 1 / (1 + noise):
        return "slower"
    if 1 / (1 + noise) <= found.low and found.high <= 1 + noise:
        return "same"
    return "undecided"


def percentiles(latencies: Sequence[float]) -> Percentiles:
    """Return the percentiles for which the samples give an upper bound at `CONFIDENCE`.

    The bound is an order statistic, so p90 needs 29 samples, p95 59, p99 299.
    """

    def known(p: float) -> float | None:
        bound = quantile_test(latencies, p=p, alternative="less").confidence_interval(CONFIDENCE)
        return float(np.quantile(latencies, p)) if np.isfinite(bound.high) else None

    return Percentiles(
        p50=float(np.median(latencies)),
        p90=known(0.90),
        p95=known(0.95),
        p99=known(0.99),
        samples=len(latencies),
    )
