"""The verdict over all limits: speed, size, slices, the last release."""

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import classified
from pydantic import ValidationError

from benchmarks.figures import Percentiles, Ratio
from benchmarks.metrics import score
from benchmarks.outcomes import Fidelity, Outcomes
from pipeline import gate
from pipeline.budget import Budget
from pipeline.evidence import Evidence, EvidenceError
from pipeline.gate import check_latency, check_ratio, check_speedup
from pipeline.report import Check, Load, Score, Stage


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(1.6, 1.9, "pass"), (1.2, 1.4, "fail"), (1.4, 1.6, "inconclusive"), (1.5, 1.6, "pass")],
)
def test_a_speedup_passes_by_its_lower_bound(low, high, outcome):
    ratio = {"value": 1.5, "low": low, "high": high}
    assert check_speedup("1x128", ratio, 1.5).outcome == outcome


def test_a_size_is_exact():
    assert check_ratio("size", 40, 100, 0.4).outcome == "pass"
    assert check_ratio("size", 41, 100, 0.4).outcome == "fail"
    with pytest.raises(EvidenceError, match="size: found 0 for the baseline"):
        check_ratio("size", 1, 0, 0.4)
    with pytest.raises(EvidenceError, match="size: found nan"):
        check_ratio("size", math.nan, 1, 0.4)


@pytest.mark.parametrize(
    ("outcomes_found", "expected"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "inconclusive"], "inconclusive"),
        (["inconclusive", "fail", "pass"], "fail"),
    ],
)
def test_a_verdict_is_its_worst_check(outcomes_found, expected):
    checks = tuple(Check("x", 1, 1, 1, 1, outcome) for outcome in outcomes_found)
    assert gate.judge(checks).outcome == expected


def stage(size: int = 100, peak: int | None = 200_000_000, speedup: float = 1.0) -> Stage:
    ratio = Ratio(speedup, speedup - 0.1, speedup + 0.1)
    latency = Percentiles(4.0, None, None, None, 9, intervals={"p50": (3.8, 4.2)})
    load = Load(8, 128, latency, 1.0, 1.0, ratio, ratio)
    memory = {"peak_rss_bytes": peak}
    return Stage("s", None, "onnx", "r", "f", 0, 1, size, Score("accuracy", 1, 1),
                 Fidelity(1.0, None, None), (load,), memory, 0, (), (), ())  # fmt: skip


def evidence(wrong=1, mended=1, examples=900, first=None, last=None, **options) -> Evidence:
    """Return the evidence of models that differ in so many examples."""
    ids = tuple(f"{at:064x}" for at in range(examples))
    sides, stages = [], []
    columns = classified(wrong, mended, examples)
    for of_side, measured in zip(columns, (first or stage(), last or stage()), strict=True):
        sides.append(Outcomes(ids, of_side, of_side["prediction"], None))
        found = Score("accuracy", score("accuracy", of_side), examples)
        stages.append(replace(measured, score=found))
    return Evidence(*sides, *stages, ("no", "yes"), **options)


def test_every_limit_that_is_set_is_checked():
    budget = Budget(
        max_drop=0.02, max_relative_drop=0.02, max_flips=0.02, min_agreement=0.9, min_speedup=1.5,
        max_size=0.2, max_memory=0.8, max_p50_ms=5.0, max_peak_mb=100.0, max_mb=1e-4,
        min_throughput_per_s=1900.0,
    )  # fmt: skip
    last = stage(30, 150_000_000, 2.0)
    found = gate.checks(budget, evidence(last=last, dedicated=True))
    assert [(check.what, check.outcome) for check in found] == [
        ("accuracy drop", "pass"),
        ("relative accuracy drop", "pass"),
        ("flips", "pass"),
        ("agreement", "pass"),
        ("size", "fail"),
        ("peak memory", "pass"),
        ("speedup at 8x128", "pass"),
        ("p50 at 8x128 in ms", "pass"),
        ("peak memory in MB", "fail"),
        ("size in MB", "pass"),
        ("examples a second at 8x128", "pass"),
    ]
    rate = found[-1]  # 8 examples in 4.0 ms, which may be 3.8 to 4.2
    assert (rate.low, rate.estimate, rate.high) == pytest.approx((1904.76, 2000, 2105.26), rel=1e-5)
    assert rate.at_least


@pytest.mark.parametrize(("most", "outcome"), [(0.8, "pass"), (0.7, "inconclusive"), (0.5, "fail")])
def test_energy_is_judged_by_its_interval(most, outcome):
    load = replace(stage().loads[0], energy=Ratio(0.7, 0.6, 0.8))
    found = evidence(last=replace(stage(), loads=(load,)))
    (check,) = gate.checks(Budget(max_energy=most), found)
    assert (check.what, check.outcome, check.estimate) == ("energy at 8x128", outcome, 0.7)


def test_an_absolute_throughput_is_judged_by_its_bounds():
    for least, outcome in ((1900, "pass"), (2000, "inconclusive"), (2200, "fail")):
        budget = Budget(min_throughput_per_s=least)
        (check,) = gate.checks(budget, evidence(dedicated=True))
        assert check.outcome == outcome


def test_memory_of_another_machine_is_an_error():
    here, there = {"machine.cpu": '"a"'}, {"machine.cpu": '"b"'}
    budget = Budget(regression={"report": "old", "max_memory": 1.0})
    now = evidence(places=(here, here))
    assert gate.judge(gate.checks(budget, now, now)).outcome == "pass"
    with pytest.raises(
        EvidenceError, match=r"peak memory: found it measured with other machine\.cpu"
    ):
        gate.checks(budget, now, replace(now, places=(there, here)))


@pytest.mark.parametrize(
    "limit", ["min_speedup", "max_energy", "max_p50_ms", "min_throughput_per_s"]
)
def test_times_are_judged_at_the_confidence_of_their_intervals(limit):
    assert Budget(**{limit: 1.0}, confidence=0.975)
    with pytest.raises(ValidationError, match=f"expected at most 0.975 with {limit}"):
        Budget(**{limit: 1.0}, confidence=0.99)


@pytest.mark.parametrize(
    ("budget", "changes", "message"),
    [
        ({}, {}, "budget: found no limit"),
        ({"max_memory": 1.0}, {"last": stage(peak=None)}, "peak memory: found no measurement"),
        ({"max_energy": 1.0}, {}, "energy at 8x128: found no measurement"),
        ({"max_p50_ms": 1.0}, {}, "found max_p50_ms, which hold on a target that nothing else"),
        ({"max_p99_ms": 1.0}, {"dedicated": True}, "p99 at 8x128 in ms: found too few samples"),
        ({"max_perplexity_ratio": 1.1}, {}, "expected max_drop or max_relative_drop"),
        ({"max_kl": 0.1}, {}, "KL: found no class probabilities"),
        ({"slices": {"column": "genre", "max_drop": 0.1}}, {}, "found no column 'genre' in the"),
        (
            {"slices": {"column": "genre", "max_drop": 0.1, "values": ["play"]}},
            {"slices": {"genre": ["prose"] * 900}},
            "found no example with genre play",
        ),
        ({"regression": {"report": "x", "max_drop": 0.1}}, {}, "found no released report"),
        ({"baseline_floor": 0.999, "max_drop": 0.1}, {}, r"expected more than 0\.999"),
        (
            {"baseline_floor": 0.999, "regression": {"report": "x", "max_flips": 0.1}},
            {},
            r"expected more than 0\.999",
        ),
    ],
)
def test_what_cannot_be_judged_is_an_error(budget, changes, message):
    with pytest.raises(EvidenceError, match=message):
        gate.checks(Budget(**budget), evidence(**changes))


@pytest.mark.parametrize(
    ("low", "high", "outcome"), [(3.0, 4.9, "pass"), (5.1, 6.0, "fail"), (4.0, 6.0, "inconclusive")]
)
def test_a_latency_is_judged_by_its_interval(low, high, outcome):
    load = {
        "batch": 1,
        "sequence": 8,
        "latency_ms": {"p50": 4.5, "intervals": {"p50": [low, high]}},
    }
    assert check_latency("p50", load, 5.0).outcome == outcome


def test_every_slice_has_to_pass():
    # All that is lost is lost among the first 100 of 900 examples.
    genres = ["play"] * 100 + ["prose"] * 780 + ["verse"] * 20
    budget = {"max_drop": 0.05, "slices": {"column": "genre", "max_drop": 0.05}}
    found = gate.checks(Budget(**budget), evidence(20, 0, slices={"genre": genres}))
    assert [(check.what, check.outcome) for check in found] == [
        ("accuracy drop", "pass"),
        ("accuracy drop, genre play", "fail"),
        ("accuracy drop, genre prose", "pass"),
        ("accuracy drop, genre verse", "inconclusive"),
    ]
    assert found[-1].note == "found 20 examples, at least 100 are asked for: 80 more"
    assert found[1].estimate == pytest.approx(0.2)
    few = {"column": "genre", "max_drop": 0.9, "min_examples": {"play": 101, "verse": 20}}
    found = gate.checks(Budget(slices=few), evidence(20, 0, slices={"genre": genres}))
    assert [check.outcome for check in found] == ["inconclusive", "pass", "pass"]


def test_a_release_is_compared_with_the_one_before():
    now = evidence(9, 0)  # 9 of 900 lost against the run's own baseline, as the release had
    released = replace(now, baseline=now.candidate, first=now.last)
    limits = {"max_drop": 0.02, "regression": {"report": "old", "max_drop": 0.01}}
    found = gate.checks(Budget(**limits), now, released)
    assert [(check.what, check.estimate) for check in found] == [
        ("accuracy drop", pytest.approx(0.01)),
        ("accuracy drop against released", 0.0),
    ]
    assert gate.judge(found).outcome == "pass"


def test_without_limits_of_its_own_a_regression_has_the_budgets():
    budget = gate.against_released(Budget(max_drop=0.02, max_size=0.5, min_speedup=2.0), "old")
    assert budget.regression.model_dump(exclude_none=True) == {
        "report": "old", "max_drop": 0.02, "max_size": 0.5,
    }  # fmt: skip
    own = Budget(max_drop=0.02, regression={"report": "a", "max_drop": 0.5})
    assert gate.against_released(own, "b").regression.model_dump(exclude_none=True) == {
        "report": "b", "max_drop": 0.5,
    }  # fmt: skip


def test_a_regression_checks_something():
    with pytest.raises(ValidationError, match="found no limit, expected one, such as max_drop"):
        Budget(regression={"report": "old"})
    with pytest.raises(EvidenceError, match="found no limit to compare with old by, expected one"):
        gate.against_released(Budget(min_speedup=2.0), "old")


def test_a_release_that_guesses_is_no_baseline():
    now, guessing = evidence(0, 0), evidence(450, 0)
    released = replace(now, baseline=guessing.candidate, first=guessing.last)
    budget = Budget(regression={"report": "old", "max_drop": 0.1})
    with pytest.raises(EvidenceError, match="take a trained model"):
        gate.checks(budget, now, released)


def test_identical_outcomes_never_fail_and_no_seed_passes_a_dead_layer():
    """A copy is the same; a model without one of its layers guesses."""
    generator = np.random.default_rng(0)
    budget = Budget(max_drop=0.02)
    for examples in (50, 200, 872, 3000):
        copy = gate.judge(gate.checks(budget, evidence(0, 0, examples)))
        assert copy.outcome == ("pass" if examples > 149 else "inconclusive")
        for _ in range(5):
            wrong = int(generator.binomial(examples, 0.5))
            assert gate.judge(gate.checks(budget, evidence(wrong, 0, examples))).outcome == "fail"
