"""How fast predictors are, compared fairly.

All artifacts are open at once, each in its own process, and take turns: A B C, C B A, A B C ... A
machine that slows down slows all of them, so the ratio of two artifacts within a round is steady
where their latencies are not. The ratio is the median over the rounds, its interval the order
statistics of the rounds, exact and free of any distribution.

R rounds.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, Literal, TypeVar

import numpy as np
from scipy.stats import quantile_test, rankdata

from benchmarks import energy
from benchmarks.accuracy import Track, silent
from benchmarks.energy import Counter
from benchmarks.figures import Percentiles, Ratio
from benchmarks.worker import Arrays, Worker

CONFIDENCE: Final = 0.95
REWARMED: Final = 1
"""Calls at the start of a turn that are not counted: the caches hold another model's weights."""
COUNTED: Final = 2
"""Calls of a turn that are counted."""
FEWEST: Final = 6
"""Rounds below which there is no interval of a median at `CONFIDENCE`."""
WINDOW_SECONDS: Final = 1.0
"""Of a turn in which energy is measured."""
TRUSTED: Final = 15
"""Rounds below which a narrow interval may be luck."""
LOOKED: Final = 5
"""After so many rounds each it is looked at: such intervals cover a little less than they say."""

T = TypeVar("T")
Turns = list[list[float]]
"""Latencies in milliseconds: turn -> call."""
Speed = Literal["faster", "slower", "same", "undecided"]


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


def energies(
    workers: Mapping[str, Worker],
    loads: int,
    counters: list[Counter],
    track: Track = silent,
) -> dict[str, list[list[float]]]:
    """Return the joules of a call on each held batch: artifact -> load -> rounds, in turns.

    Turns are long enough for sensors that are read ten times a second, and few.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in workers}
    for load in range(loads):
        once = {
            name: min(worker.time(load, REWARMED + COUNTED)) for name, worker in workers.items()
        }

        def metered(name: str, load: int = load, once: Mapping[str, int] = once) -> list[float]:
            calls = math.ceil(WINDOW_SECONDS * 1e9 / once[name])
            before = energy.read(counters)
            workers[name].time(load, calls)
            return [energy.joules(counters, before, energy.read(counters)) / calls]

        turns = interleave(
            {name: name for name in workers},
            metered,
            rounds=FEWEST,
            seconds=math.inf,
            track=track,
            what=f"energy of load {load + 1} of {loads}",
        )
        for name, each in turns.items():
            found[name].append([joules for (joules,) in each])
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

    It ends after `rounds` rounds, or after `seconds`, but not before 6 rounds, the fewest that
    bound a median at 95 %; or, from 15 rounds on, when every ratio to the first artifact is known
    to `precision`.

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
    if precision is None or len(first) < TRUSTED or len(first) % LOOKED:
        return False
    # One alone is compared with itself a turn before: with how steady it is.
    pairs = [(first, other) for other in others] or [(first[1:], first[:-1])]
    ratios = [ratio(*pair) for pair in pairs]
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
    """Return the percentiles of latencies, in the order in which they were measured.

    Each is one of the latencies: the smallest that is not below that share, as LoadGen has it.
    The bounds are order statistics. An upper bound alone at `CONFIDENCE` is what makes a percentile
    known: p90 needs 29 samples, p95 59, p99 299. Both ends of its interval need 36, 72 and 368.
    """

    def at(p: float) -> float:
        return float(np.quantile(latencies, p, method="higher"))

    def known(p: float) -> float | None:
        bound = quantile_test(latencies, p=p, alternative="less").confidence_interval(CONFIDENCE)
        return at(p) if np.isfinite(bound.high) else None

    def interval(p: float) -> tuple[float | None, float | None]:
        bounds = quantile_test(latencies, p=p).confidence_interval(CONFIDENCE)
        low, high = (float(end) if np.isfinite(end) else None for end in bounds)
        return low, high

    shares = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
    values = {name: known(share) for name, share in shares.items()}
    return Percentiles(
        p50=at(0.5),
        p90=values["p90"],
        p95=values["p95"],
        p99=values["p99"],
        samples=len(latencies),
        effective_samples=effective_samples(latencies),
        intervals={n: interval(p) for n, p in shares.items() if n == "p50" or values[n]},
        quantiles=tuple(np.quantile(latencies, np.linspace(0, 1, 21)).tolist()),
    )


def effective_samples(latencies: Sequence[float]) -> float:
    """Return how many independent samples these are worth, in their order.

    n (1 - r) / (1 + r) with r the correlation of a sample's rank with the one's before, as for a
    process that remembers one step (Bayley and Hammersley 1946, J. R. Stat. Soc. Suppl. 8:184-197);
    at most n. Ranks, since a few slow calls would hide all others.
    """
    count = len(latencies)
    ranks = rankdata(latencies) - (count + 1) / 2
    spread = float(ranks @ ranks)
    correlation = max(0.0, float(ranks[:-1] @ ranks[1:]) / spread) if spread else 0.0
    return count * (1 - correlation) / (1 + correlation)
