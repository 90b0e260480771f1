"""What an artifact does when it is its turn, by scenario, and what its turns come to.

R turns; see benchmarks/scenarios.py for the ways in which queries come.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Final

import numpy as np

from benchmarks import energy, scenarios, speed
from benchmarks.accuracy import Track
from benchmarks.examples import Arrays
from benchmarks.speed import Turns
from benchmarks.worker import Worker
from pipeline.candidates import Candidate

BATCHES: Final[Mapping[str, Sequence[int]]] = {
    "single-stream": (1,),
    "multi-stream": (scenarios.MULTI_STREAM,),
    "offline": (1, 8, 32),
    "server": (1,),
    "generation": (1,),
}
"""Of a query, unless told otherwise."""
OFFLINE_SECONDS: Final = 0.3
SERVER_SECONDS: Final = 2.0
FEWEST_QUERIES: Final = 30
"""Of a turn: enough for queries to queue up as they do in the long run."""
LOADGEN: Final = {"seconds": 5.0, "queries": 64}
"""What a run of LoadGen lasts at least."""
UTILIZATION: Final = 0.5
"""Share of the slowest artifact's capacity at which queries arrive, unless a rate is given."""


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    `loads` are batch and tokens; `seconds`, of a load, and `rounds` are at most; `precision` is
    half of a ratio's interval at which it is narrow enough, `noise` the difference that does not
    matter, both as shares; `rate` is of queries a second, None for `UTILIZATION`; `text` is a file
    of lines; with `loadgen`, LoadGen measures each artifact once more.
    """

    scenario: str = "single-stream"
    loads: tuple[tuple[int, int], ...] = ((1, 128),)
    device: str = "cpu"
    threads: int = 1
    seconds: float = 60.0
    rounds: int = 2000
    precision: float = 0.02
    noise: float = 0.05
    rate: float | None = None
    new_tokens: int = 32
    text: Path | None = None
    loadgen: bool = False


@dataclass(frozen=True)
class Bench:
    """What a scenario needs: the artifacts by name, and their inputs for every load."""

    found: Mapping[str, Candidate]
    inputs: Mapping[str, Sequence[Arrays]]
    settings: Settings
    track: Track

    def open(self, candidate: Candidate, threads: int) -> Worker:
        """Return a process with an artifact open in it."""
        device = self.settings.device
        return Worker(candidate.opener, candidate.source, device=device, threads=threads)


Results = dict[str, list[dict[str, Any]]]
Turn = Callable[[str], list[float]]
Start = Callable[[Bench, Mapping[str, Worker], int], tuple[Turn, dict[str, Any]]]
"""What begins a load: to the function that is one turn of an artifact, and what is to be said."""
Summary = Callable[[Turns, tuple[int, int]], dict[str, Any]]


def _one_after_another(this: Bench, start: Start, summary: Summary) -> Results:
    """Return the results of a scenario in which an artifact is one process."""
    results: Results = {name: [] for name in this.found}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(this.open(each, this.settings.threads))
            for name, each in this.found.items()
        }
        for at, load in enumerate(this.settings.loads):
            for name, worker in workers.items():
                worker.hold(at, this.inputs[name][at])
            turn, about = start(this, workers, at)
            turns, watts = _take_turns(this, turn, load)
            for name, each in turns.items():
                results[name].append(
                    _result(this, turns, name, load)
                    | {"watts": watts[name]}
                    | about
                    | summary(each, load)
                    | _driven(this, workers[name], at, about.get("rate_per_s"))
                )
    return results


def _stream(this: Bench, workers: Mapping[str, Worker], at: int) -> tuple[Turn, dict[str, Any]]:
    """Send one query when the one before is answered."""
    del this
    for worker in workers.values():
        speed.warm_up(worker, at)
    return lambda name: speed.turn(at, workers[name]), {}


def _latencies(turns: Turns, load: tuple[int, int]) -> dict[str, Any]:
    calls = [ms for turn in turns for ms in turn]
    return {
        "latency_ms": asdict(speed.percentiles(calls)),
        "throughput_per_s": load[0] * 1e3 / float(np.mean(calls)),
    }


def _serve(this: Bench, workers: Mapping[str, Worker], at: int) -> tuple[Turn, dict[str, Any]]:
    """Send queries when they please, the same for all; latency counts from when one was due."""
    for worker in workers.values():
        speed.warm_up(worker, at)
    slowest = max(float(np.median(worker.time(at, 9))) for worker in workers.values())
    rate = this.settings.rate or UTILIZATION * 1e9 / slowest
    turns = dict.fromkeys(workers, 0)

    def turn(name: str) -> list[float]:
        turns[name] += 1
        arrivals = scenarios.poisson(
            rate, max(round(SERVER_SECONDS * rate), FEWEST_QUERIES), turns[name]
        )
        return scenarios.server(workers[name], at, arrivals)

    return turn, {"rate_per_s": rate}


def _waits(turns: Turns, load: tuple[int, int]) -> dict[str, Any]:
    del load
    return {"latency_ms": asdict(speed.percentiles([ms for turn in turns for ms in turn]))}


def _generate(this: Bench, workers: Mapping[str, Worker], at: int) -> tuple[Turn, dict[str, Any]]:
    """Generate a fixed number of tokens."""
    prompts = {name: this.inputs[name][at] for name in workers}
    for name, worker in workers.items():
        scenarios.generation(worker, prompts[name])  # warms up
    return lambda name: scenarios.generation(workers[name], prompts[name]), {}


def _tokens(turns: Turns, load: tuple[int, int]) -> dict[str, Any]:
    others = [ms for stamps in turns for ms in stamps[1:]]
    return {
        "first_token_ms": asdict(speed.percentiles([stamps[0] for stamps in turns])),
        "token_ms": asdict(speed.percentiles(others)) if others else None,
        "tokens_per_s": load[0] * 1e3 / float(np.mean(turns)),
    }


def _offline(this: Bench) -> Results:
    """Return how many inputs a second are answered, at the best batch and instances of each."""
    results: Results = {name: [] for name in this.found}
    loads = this.settings.loads
    for length in sorted({length for _, length in loads}):
        places = [at for at, load in enumerate(loads) if load[1] == length]
        best = {name: _best(this, name, places) for name in this.found}
        with ExitStack() as stack:
            instances = {
                name: stack.enter_context(_instances(this, name, *best[name]))
                for name in this.found
            }

            def turn(name: str, best: _Best = best, instances: _Open = instances) -> list[float]:
                at = best[name][1]
                return scenarios.offline(instances[name], at, loads[at][0], OFFLINE_SECONDS)

            turns, watts = _take_turns(this, turn, (0, length))
            for name, (count, at) in best.items():
                rate = 1e3 / float(np.median(turns[name]))
                about = {"instances": count, "throughput_per_s": rate, "watts": watts[name]}
                driven = _driven(this, instances[name][0], at, rate) if count == 1 else {}
                results[name].append(_result(this, turns, name, loads[at]) | about | driven)
    return results


_Best = Mapping[str, tuple[int, int]]
_Open = Mapping[str, Sequence[Worker]]


@contextmanager
def _instances(this: Bench, name: str, count: int, at: int) -> Iterator[list[Worker]]:
    """Give `count` processes that share the threads, each with the batch of a load."""
    with ExitStack() as stack:
        threads = this.settings.threads // count
        workers = [stack.enter_context(this.open(this.found[name], threads)) for _ in range(count)]
        for worker in workers:
            worker.hold(at, this.inputs[name][at])
        yield workers


def _best(this: Bench, name: str, places: Sequence[int]) -> tuple[int, int]:
    """Return the number of instances and the load that answer most inputs a second."""
    threads, took = this.settings.threads, {}
    for count in (count for count in range(1, threads + 1) if threads % count == 0):
        for at in places:
            batch = this.settings.loads[at][0]
            with _instances(this, name, count, at) as workers:
                tried = [scenarios.offline(workers, at, batch, OFFLINE_SECONDS) for _ in range(2)]
            took[count, at] = tried[-1]
    return min(took, key=took.__getitem__)


def _driven(this: Bench, worker: Worker, at: int, rate: float | None) -> dict[str, Any]:
    """Return what LoadGen measures of an artifact, by itself, if it is to."""
    if not this.settings.loadgen:
        return {}
    about = {"scenario": this.settings.scenario, "batch": this.settings.loads[at][0]}
    return {"loadgen": worker.drive(at, about | LOADGEN | {"rate": rate or 1.0})}


def _take_turns(
    this: Bench, turn: Turn, load: tuple[int, int]
) -> tuple[dict[str, Turns], dict[str, float | None]]:
    """Return the turns of all artifacts, and the power used in them, where it can be read."""
    counters = sensors(this.settings)[0]
    joules, seconds = dict.fromkeys(this.found, 0.0), dict.fromkeys(this.found, 0.0)

    def metered(name: str) -> list[float]:
        before, start = energy.read(counters), monotonic()
        latencies = turn(name)
        joules[name] += energy.joules(counters, before, energy.read(counters))
        seconds[name] += monotonic() - start
        return latencies

    settings = this.settings
    turns = speed.interleave(
        {name: name for name in this.found},
        metered,
        rounds=settings.rounds,
        seconds=settings.seconds,
        precision=settings.precision,
        track=this.track,
        what=f"timing {load[0]}x{load[1]}" if load[0] else f"timing {load[1]} tokens",
    )
    return turns, {name: joules[name] / seconds[name] if counters else None for name in turns}


def sensors(settings: Settings) -> tuple[list[energy.Counter], str]:
    """Return what tells the power that is used, or nothing and the reason."""
    if settings.device != "cpu":
        return (
            [],
            "a GPU's counter is too slow for turns; the energy of a call is in a run's report",
        )
    return energy.counters(settings.device)


def _result(
    this: Bench, turns: Mapping[str, Turns], name: str, load: tuple[int, int]
) -> dict[str, Any]:
    first = next(iter(this.found))
    ratio = speed.ratio(turns[first], turns[name])
    return {
        "batch": load[0],
        "sequence": load[1],
        "turns": len(turns[name]),
        "ratio": asdict(ratio),
        "verdict": speed.verdict(ratio, this.settings.noise) if name != first else "first",
    }


SCENARIOS: Final[Mapping[str, Callable[[Bench], Results]]] = {
    "single-stream": partial(_one_after_another, start=_stream, summary=_latencies),
    "multi-stream": partial(_one_after_another, start=_stream, summary=_latencies),
    "offline": _offline,
    "server": partial(_one_after_another, start=_serve, summary=_waits),
    "generation": partial(_one_after_another, start=_generate, summary=_tokens),
}
