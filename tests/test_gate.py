"""The gate against published values, exact enumeration, and bad evidence."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import multinomial, norm

from benchmarks.figures import Percentiles, Ratio
from benchmarks.metrics import METRICS
from benchmarks.outcomes import Fidelity
from pipeline import gate
from pipeline.gate import EvidenceError, check_ratio, check_score, check_speedup
from pipeline.report import Check, Load, Score, Stage


def outcomes(wrong: int, mended: int, examples: int) -> tuple[dict, dict]:
    """Return baseline and candidate columns with so many discordant pairs; the rest are right."""
    label = np.zeros(examples, int)
    baseline, candidate = label.copy(), label.copy()
    candidate[:wrong] = 1
    baseline[wrong : wrong + mended] = 1
    return {"label": label, "prediction": baseline}, {"label": label, "prediction": candidate}


def verdict(baseline, candidate, allowed, metric="accuracy") -> Check:
    return check_score(metric, baseline, candidate, allowed=allowed, confidence=0.95)


def test_tango_gives_the_published_values():
    # Tango 1998, the contact lens example: n = 44, b = 1, c = 0, difference -0.1.
    assert gate.tango(1, 0, 44, -0.1) == pytest.approx(1.709, abs=5e-4)
    low, high = gate.tango_interval(1, 0, 44, 0.95)
    assert (low, high) == (pytest.approx(-0.0957, abs=5e-5), pytest.approx(0.0365, abs=5e-5))


@pytest.mark.parametrize(("examples", "discordant"), [(60, 0.1), (120, 0.2)])
def test_a_true_drop_equal_to_the_budget_passes_rarely(examples, discordant):
    """Sum the probability of every outcome in which the gate passes."""
    drop = 0.05
    lost, won = (discordant + drop) / 2, (discordant - drop) / 2
    accepted = 0.0
    for wrong in range(examples + 1):
        for mended in range(examples + 1 - wrong):
            counts = [wrong, mended, examples - wrong - mended]
            chance = float(multinomial.pmf(counts, examples, [lost, won, 1 - lost - won]))
            if chance > 1e-12 and gate.tango(wrong, mended, examples, -drop) > norm.ppf(0.95):
                accepted += chance
    assert 0.0 < accepted <= 0.06


def test_three_outcomes():
    assert verdict(*outcomes(10, 10, 3000), allowed=0.01).outcome == "pass"
    assert verdict(*outcomes(90, 10, 3000), allowed=0.01).outcome == "fail"
    undecided = verdict(*outcomes(30, 15, 1000), allowed=0.02)
    assert undecided.outcome == "inconclusive"
    assert "more examples would decide" in undecided.note


def test_the_examples_it_asks_for_decide():
    few = verdict(*outcomes(30, 15, 1000), allowed=0.02)
    more = int(few.note.split()[1])
    factor = (1000 + more) / 1000
    many = outcomes(round(30 * factor), round(15 * factor), 1000 + more)
    assert verdict(*many, allowed=0.0202).outcome == "pass"


def test_pass_agrees_with_the_test_statistic():
    for wrong in range(0, 60, 7):
        check = verdict(*outcomes(wrong, 5, 900), allowed=0.03)
        assert (check.outcome == "pass") == (gate.tango(wrong, 5, 900, -0.03) > norm.ppf(0.95))


def test_equal_outcomes_pass_only_with_enough_examples():
    assert verdict(*outcomes(0, 0, 300), allowed=0.01).outcome == "pass"
    assert verdict(*outcomes(0, 0, 100), allowed=0.01).outcome == "inconclusive"


def test_a_mean_metric_is_judged_by_paired_differences():
    generator = np.random.default_rng(0)
    before = generator.uniform(0.5, 1.0, 400)
    after = before - 0.01 + generator.normal(0, 0.02, 400)
    columns = [{"answer_f1": values} for values in (before, after)]
    check = verdict(*columns, allowed=0.02, metric="answer_f1")
    difference = before - after
    half = 1.6487 * difference.std(ddof=1) / math.sqrt(400)
    assert check.low == pytest.approx(difference.mean() - half, rel=1e-3)
    assert check.outcome == "pass"


def test_a_corpus_metric_is_bootstrapped_over_examples():
    counts = {
        "true_positives": np.full(300, 3),
        "false_positives": np.zeros(300, int),
        "false_negatives": np.zeros(300, int),
    }
    worse = counts | {"false_positives": (np.arange(300) % 10 == 0).astype(int)}
    check = verdict(counts, worse, allowed=0.05, metric="entity_f1")
    assert check.estimate == pytest.approx(1 - 1800 / 1830)
    assert check.low < check.estimate < check.high < 0.05
    assert check.outcome == "pass"
    assert verdict(counts, worse, allowed=0.05, metric="entity_f1") == check


def test_perplexity_is_judged_by_documents():
    tokens = np.full(200, 50.0)
    generator = np.random.default_rng(0)
    before = {"nll": generator.uniform(90, 110, 200), "tokens": tokens}
    after = {"nll": before["nll"] + 50 * 0.03, "tokens": tokens}
    check = verdict(before, after, allowed=1.05, metric="perplexity")
    assert check.estimate == pytest.approx(math.exp(0.03))
    assert (check.low, check.high) == (pytest.approx(check.estimate), pytest.approx(check.estimate))
    assert check.outcome == "pass"
    assert verdict(before, after, allowed=1.02, metric="perplexity").outcome == "fail"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {**c, "prediction": c["prediction"][:-1]}, "expected the same examples"),
        (lambda c: {**c, "label": c["label"] + 1}, "found other values of 'label'"),
        (lambda c: {"label": c["label"]}, "expected the same"),
        (lambda c: {**c, "prediction": np.full(50, np.nan)}, "found NaN or infinity"),
    ],
)
def test_bad_evidence_is_an_error(change, message):
    baseline, candidate = outcomes(1, 1, 50)
    with pytest.raises(EvidenceError, match=message):
        verdict(baseline, change(candidate), allowed=0.5)


def test_no_examples_are_an_error():
    with pytest.raises(EvidenceError, match="at least one"):
        verdict(*outcomes(0, 0, 0), allowed=0.5)


def test_other_tokens_are_an_error():
    before = {"nll": np.ones(3), "tokens": np.ones(3)}
    with pytest.raises(EvidenceError, match="found other values of 'tokens'"):
        verdict(before, before | {"tokens": np.full(3, 2)}, allowed=1.1, metric="perplexity")


@pytest.mark.parametrize(
    ("metric", "columns"),
    [
        ("answer_f1", {"answer_f1": np.ones(29)}),
        ("perplexity", {"nll": np.ones(29), "tokens": np.ones(29)}),
        ("macro_f1", outcomes(0, 0, 29)[0]),
    ],
)
def test_a_handful_of_examples_decides_nothing(metric, columns):
    check = verdict(columns, columns, allowed=1.5 if metric == "perplexity" else 0.5, metric=metric)
    assert (check.outcome, check.note) == (
        "inconclusive",
        "found 29 examples, at least 30 are needed",
    )


def test_one_example_of_a_mean_is_an_error():
    one = {"answer_f1": np.ones(1)}
    with pytest.raises(EvidenceError, match="found 1 example"):
        verdict(one, one, allowed=0.1, metric="answer_f1")


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(1.6, 1.9, "pass"), (1.2, 1.4, "fail"), (1.4, 1.6, "inconclusive"), (1.5, 1.6, "pass")],
)
def test_a_speedup_passes_by_its_lower_bound(low, high, outcome):
    assert check_speedup("1x128", Ratio(1.5, low, high), 1.5).outcome == outcome


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


@dataclass
class Limits:
    max_drop: float | None = None
    max_perplexity_ratio: float | None = None
    confidence: float = 0.95
    min_speedup: float | None = None
    max_size: float | None = None
    max_memory: float | None = None


def stage(size: int, peak: int | None, speedup: float) -> Stage:
    ratio = Ratio(speedup, speedup - 0.1, speedup + 0.1)
    load = Load(8, 128, Percentiles(1.0, None, None, None, 1), 1.0, 1.0, ratio, ratio)
    memory = {"peak_rss_bytes": peak}
    return Stage("s", None, "onnx", "r", "f", 0, 1, size, Score("accuracy", 1, 1),
                 Fidelity(1.0, None, None), (load,), memory, 0, (), (), ())  # fmt: skip


def test_every_limit_that_is_set_is_checked():
    baseline, candidate = outcomes(1, 1, 900)
    stages = [stage(100, 200, 1.0), stage(30, 150, 2.0)]
    everything = Limits(max_drop=0.02, min_speedup=1.5, max_size=0.2, max_memory=0.8)
    found = gate.checks(everything, "accuracy", baseline, candidate, stages)
    assert [(check.what, check.outcome) for check in found] == [
        ("accuracy drop", "pass"),
        ("speedup at 8x128", "pass"),
        ("size", "fail"),
        ("peak memory", "pass"),
    ]
    assert gate.checks(Limits(), "accuracy", baseline, candidate, stages) == ()
    with pytest.raises(EvidenceError, match="peak memory: found no measurement"):
        gate.checks(
            Limits(max_memory=1.0), "accuracy", baseline, candidate, [stages[0], stage(1, None, 1)]
        )


def test_every_metric_can_be_judged():
    columns = {
        "accuracy": outcomes(1, 1, 50)[0],
        "macro_f1": outcomes(1, 1, 50)[0],
        "matthews": {"label": np.arange(50) % 2, "prediction": np.arange(50) % 3 % 2},
        "exact_match": {"exact_match": np.ones(50)},
        "answer_f1": {"answer_f1": np.linspace(0, 1, 50)},
        "entity_f1": {
            name: np.ones(50, int)
            for name in ("true_positives", "false_positives", "false_negatives")
        },
        "perplexity": {"nll": np.linspace(1, 2, 50), "tokens": np.ones(50)},
    }
    for name in METRICS:
        allowed = 1.5 if name == "perplexity" else 0.5
        assert verdict(columns[name], columns[name], allowed, metric=name).outcome == "pass", name
