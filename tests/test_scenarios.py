"""Ways in which queries come, with predictors of known cost; and whose turn it is."""

import numpy as np
import pytest
from known_predictors import INPUTS

from benchmarks import scenarios, speed
from benchmarks.speed import Ratio


def test_who_waits_for_its_turn_is_late(opened):
    worker = opened("sleeper", "0.010")
    worker.hold(0, INPUTS)
    late = scenarios.server(worker, 0, [5_000_000 * at for at in range(20)])
    assert np.diff(late).min() > 4  # each waits 5 ms longer than the one before
    assert late[-1] >= 10 + 19 * 5
    spread = scenarios.server(worker, 0, [60_000_000 * at for at in range(5)])
    assert np.median(spread) < 30


def test_queries_come_at_the_rate_they_should():
    arrivals = scenarios.poisson(200, 5000, seed=1)
    gaps = np.diff(arrivals) / 1e9
    assert arrivals == sorted(arrivals)
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # of an exponential distribution
    assert arrivals[:100] == scenarios.poisson(200, 5000, seed=1)[:100]
    assert arrivals != scenarios.poisson(200, 5000, seed=2)


def test_two_instances_answer_twice_as_much(opened):
    workers = [opened("sleeper", "0.020") for _ in range(2)]
    for worker in workers:
        worker.hold(0, INPUTS)
    (alone,) = scenarios.offline(workers[:1], 0, 4, seconds=0.5)
    (both,) = scenarios.offline(workers, 0, 4, seconds=0.5)
    assert alone == pytest.approx(20 / 4, rel=0.2)
    assert both == pytest.approx(10 / 4, rel=0.2)


def test_turns_are_taken_there_and_back():
    seen = []

    def turn(name):
        seen.append(name)
        return [1.0]

    found = speed.interleave({"A": "a", "B": "b"}, turn, rounds=3, seconds=60)
    assert seen == ["a", "b", "b", "a", "a", "b"]
    assert found == {"A": [[1.0]] * 3, "B": [[1.0]] * 3}


@pytest.mark.parametrize(("spread", "rounds"), [(0.0, 15), (0.5, 40)])
def test_it_ends_when_the_interval_is_narrow(spread, rounds):
    generator = np.random.default_rng(0)
    found = speed.interleave(
        {"A": 1.0, "B": 2.0},
        lambda ms: [ms * float(1 + spread * generator.random())],
        rounds=40,
        seconds=60,
        precision=0.02,
    )
    assert len(found["A"]) == rounds


def test_one_alone_ends_when_it_is_steady():
    found = speed.interleave({"A": 1.0}, lambda ms: [ms], rounds=40, seconds=60, precision=0.02)
    assert len(found["A"]) == 15


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.06, 1.20, "faster"),
        (0.80, 0.94, "slower"),
        (0.97, 1.04, "same"),
        (0.97, 1.06, "undecided"),
        (1.01, 1.20, "undecided"),
        (0.90, 0.99, "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low, high, verdict):
    assert speed.verdict(Ratio((low + high) / 2, low, high), noise=0.05) == verdict
