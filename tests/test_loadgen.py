"""LoadGen in a worker: its percentiles are ours, its failures are the worker's."""

import random

import pytest
from known_predictors import INPUTS

from benchmarks.loadgen import drive
from benchmarks.speed import percentiles
from benchmarks.worker import WorkerError

pytest.importorskip("mlperf_loadgen", reason="LoadGen is not installed")


def lists(count):
    """Yield LoadGen's results for random numbers of queries that take random times."""
    generator = random.Random(0)
    for _ in range(count):
        settings = {
            "scenario": "single-stream",
            "batch": 1,
            "seconds": 0.001,
            "queries": generator.randint(64, 800),
            "rate": 1.0,
            "trace": True,
        }
        yield drive(lambda _: [None] * generator.randint(0, 5000), {}, settings)


def check(found):
    """Compare our percentiles with LoadGen's, of its own latencies."""
    latencies = found["latencies_ns"]
    assert len(latencies) == found["result_query_count"]
    ours = percentiles(latencies)
    for name, value in {"50": ours.p50, "90": ours.p90, "95": ours.p95, "99": ours.p99}.items():
        assert value in (found[f"result_{name}.00_percentile_latency_ns"], None)
    assert (ours.p99 is None) == (len(latencies) < 299)


def test_percentiles_have_loadgens_ranks():
    for found in lists(12):
        check(found)


@pytest.mark.slow
def test_percentiles_have_loadgens_ranks_on_500_lists():
    for found in lists(500):
        check(found)


@pytest.mark.parametrize("scenario", ["single-stream", "multi-stream", "offline", "server"])
def test_it_measures_what_the_worker_does(opened, scenario):
    worker = opened("sleeper", "0.005")
    worker.hold(0, INPUTS)
    settings = {"scenario": scenario, "batch": 1, "seconds": 0.2, "queries": 20, "rate": 50.0}
    found = worker.drive(0, settings)
    if scenario == "offline":
        assert found["result_samples_per_second"] == pytest.approx(200, rel=0.2)
    else:
        assert found["result_query_count"] >= 10
        assert found["result_min_latency_ns"] >= 5e6


def test_its_failures_are_the_workers(opened):
    worker = opened("crasher")
    worker.hold(0, INPUTS)
    settings = {"scenario": "single-stream", "batch": 1, "seconds": 0.1, "queries": 5, "rate": 1.0}
    with pytest.raises(WorkerError, match="LoadGen: the artifact failed: the runtime gave up"):
        worker.drive(0, settings)
