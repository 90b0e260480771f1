"""Ways in which queries come: one after the other, as many as possible, or when they please.

The names are those of MLPerf's LoadGen. A turn is what an artifact does before the next one's turn
comes, see `speed.interleave`; it returns latencies in milliseconds.

https://github.com/mlcommons/inference_policies/blob/master/inference_rules.adoc
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from benchmarks.worker import Arrays, Worker

MULTI_STREAM: int = 8
"""Inputs of a query of the scenario multi-stream."""


def offline(instances: Sequence[Worker], load: int, batch: int, seconds: float) -> list[float]:
    """Return milliseconds an input while all instances run at once, for about `seconds`.

    Args:
        instances: of one artifact, with the held batch `load`.
        load: of `Worker.hold`.
        batch: inputs in the held batch.
        seconds: of the turn.
    """
    with ThreadPoolExecutor(len(instances)) as threads:  # they wait for replies, and use no core
        once = max(threads.map(partial(_call, load, 1), instances))
        calls = max(round(seconds / once), 1)
        start = time.perf_counter_ns()
        list(threads.map(partial(_call, load, calls), instances))
        elapsed_ms = (time.perf_counter_ns() - start) / 1e6
    return [elapsed_ms / (calls * batch * len(instances))]


def _call(load: int, calls: int, worker: Worker) -> float:
    return sum(worker.time(load, calls)) / 1e9


def server(worker: Worker, load: int, arrivals_ns: Sequence[int]) -> list[float]:
    """Return how long each query waited for its answer, from when it was due."""
    return [ns / 1e6 for ns in worker.serve(load, arrivals_ns)]


def poisson(rate_per_s: float, queries: int, seed: int) -> list[int]:
    """Return arrival times in nanoseconds, of queries that come independently of one another."""
    gaps = np.random.default_rng(seed).exponential(1e9 / rate_per_s, queries)
    return [int(at) for at in np.cumsum(gaps)]


def generation(worker: Worker, inputs: Arrays) -> list[float]:
    """Return when each new token was there, the first from the start on, the others after another.

    Args:
        worker: one whose predictor gives `token_ns` `(L,)`, when each token was there.
        inputs: the prompts, and how many `new_tokens`.
    """
    stamps = worker.predict(inputs)["token_ns"]
    return [float(ms) for ms in np.diff(stamps, prepend=0) / 1e6]
