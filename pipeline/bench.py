"""`bench`: artifacts of any format beside one another, and which is faster.

All are open at once, each in a process of its own, and take turns; see speed.py. A ratio is to the
first artifact, and is measured until its interval is narrow enough or the time is over. What cannot
be known here is None, with the reason beside it where it is not the machine's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Final

import numpy as np

from benchmarks import energy, limits, loadgen, machine, scenarios, speed
from benchmarks.accuracy import Track, silent
from benchmarks.examples import Arrays
from benchmarks.machine import Unavailable
from benchmarks.speed import Turns
from benchmarks.worker import Worker
from pipeline import candidates, openers
from pipeline.candidates import Candidate

SCHEMA: Final = 1
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
    return {
        "schema": SCHEMA,
        "settings": asdict(settings) | {"text": settings.text and str(settings.text)},
        "machine": asdict(machine.describe()) | {"stalled": stalled},
        "no_watts": _sensors(settings)[1],
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
        }


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
    sensors = _sensors(this.settings)[0]
    joules, seconds = dict.fromkeys(this.found, 0.0), dict.fromkeys(this.found, 0.0)

    def metered(name: str) -> list[float]:
        before, start = energy.read(sensors), monotonic()
        latencies = turn(name)
        joules[name] += energy.joules(sensors, before, energy.read(sensors))
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
    return turns, {name: joules[name] / seconds[name] if sensors else None for name in turns}


def _sensors(settings: Settings) -> tuple[list[energy.Counter], str]:
    if settings.device != "cpu":
        return [], f"only the processor's power is read, not that of {settings.device}"
    return energy.counters()


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


SCENARIOS: Final[Mapping[str, Callable[[Bench], Results]]] = {
    "single-stream": partial(_one_after_another, start=_stream, summary=_latencies),
    "multi-stream": partial(_one_after_another, start=_stream, summary=_latencies),
    "offline": _offline,
    "server": partial(_one_after_another, start=_serve, summary=_waits),
    "generation": partial(_one_after_another, start=_generate, summary=_tokens),
}
